# Copyright (c) 2026 the megatron_selfdistill authors. Apache-2.0.
"""GRPO: rewards alone, each compared with the rewards of the other responses to the problem.

Algorithm: Each problem gets 8 responses, and evaluation.verifier or method.reward gives each a reward. The advantage of
a response is its reward compared with the rewards of its group, and every token of the response has this advantage.
There is no teacher; method.kl_weight adds one that reads the same prompt, as the penalty of reinforcement learning.

Equation:

    w = 0,   a = A rho, and 0 where the clip of PPO holds
    A = (reward - mean) / (std + 1e-6) over the responses to the problem

Paper: GRPO, Shao et al. 2024 (arXiv 2402.03300). Published are the formula and the clip of .2.

Differences: Ours are 8 responses per problem, no penalty for the distance from the reference, and the standard
deviation with n - 1. method.advantage_std=none is Dr. GRPO (arXiv 2503.20783), and method.clip_high=0.28 is the clip of
DAPO (arXiv 2503.14476).

Expected: 100 steps of 4 x 8 responses raise the sampled accuracy from .36 to .78 on subtraction and from .51 to .92 on
additions (docs/recipes/comparison.md).

Known failure: A problem whose responses are all right or all wrong has advantages of 0. `rewards/mixed_groups` is the
share of the other problems: where it is near 0, nothing is learned.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from megatron_selfdistill.config.schema.method_config import SAME, SAMPLED, Needs
from megatron_selfdistill.config.schema.ranges import NonNegativeFloat, PositiveFloat
from megatron_selfdistill.methods.default import SelfDistillation
from megatron_selfdistill.methods.parts.settings import AdvantageSettings, SelectSettings
from megatron_selfdistill.methods.parts.terms import group_advantage, uniform
from megatron_selfdistill.sources.rollouts import Rollout
from megatron_selfdistill.sources.signals import Signals, Terms


@dataclass(frozen=True)
class GrpoSettings(AdvantageSettings, SelectSettings):
    """The settings of GRPO."""

    weight: PositiveFloat = 1.0
    """Weight of the advantages of rewards in the loss."""
    kl_weight: NonNegativeFloat = 0.0
    """Weight of the divergence from the teacher after the prompt of the samples.  With a frozen teacher it holds the
    policy near the weights of the start, as the KL penalty of reinforcement learning does.  0 needs no teacher."""

    @property
    def needs(self) -> Needs:
        """What the method needs from the core."""
        return Needs(teacher_prompt=SAME if self.kl_weight else None, log_probs=SAMPLED, rewards=True, group_size=2)


class Grpo(SelfDistillation):
    """Group-relative policy optimisation."""

    Settings = GrpoSettings

    def terms(self, step: int, rollouts: Sequence[Rollout], signals: Signals) -> Terms:
        """Return the advantages of the rewards, and the KL penalty where it has a weight."""
        weight = self.settings.kl_weight
        penalty = uniform(signals, weight=weight, signal="full") if weight else Terms.of(signals.sampled_log_prob)
        return penalty + group_advantage(signals, self.settings)
