# Copyright (c) 2026 the megatron_selfdistill authors. Apache-2.0.
"""OPSA: the model makes its own unlikely tokens less likely, without a teacher and without rewards.

Algorithm: The student samples one response per problem. Every sampled token to which the sampler gave a probability
below method.threshold gets one fixed negative advantage. All other tokens get none, and no text is judged.

Equation:

    w = 0,   a = A rho with the clip of PPO
    A = -c where mu < threshold,   A = 0 elsewhere

c is method.penalty. A token whose probability equals the threshold is not below it.

Paper: OPSA, on-policy self-adaptation (arXiv 2608.31046), of which the abstract was read. It reports that on-policy
distillation learns mostly from tokens of low log-probability, and that one fixed negative advantage matches the
advantages of a teacher.

Differences: This is the fixed advantage of the paper's analysis. OPSA itself gives tokens of high entropy a stronger
advantage, by a formula that the abstract does not state. Ours are the threshold of .1, c = 1 and the clip of .2.
Every record needs an answer, as for `grpo`, although this method does not read it.

Expected: 100 steps of 32 responses raise the sampled accuracy on additions from .57 to .82, and the entropy falls from
.91 to .19 nats. On subtraction they halve the accuracy: .37 to .18 (seed 21, the tasks of docs/recipes/comparison.md).

Known failure:
- The method does not know which answer is right. On subtraction the base is certain of nearly every token (.04 nats),
  and the model loses right answers.
- Adam divides the gradient by its size, so method.penalty hardly changes a step. Lower the learning rate instead.
- mu is the probability under the sampler's settings. With a rollout.temperature below 1, fewer tokens are unlikely.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Annotated

import torch

from megatron_selfdistill.config.schema.method_config import SAMPLED, Needs
from megatron_selfdistill.config.schema.ranges import PositiveFloat, above, at_most
from megatron_selfdistill.methods.default import SelfDistillation
from megatron_selfdistill.methods.parts.settings import ClipSettings
from megatron_selfdistill.sources.rollouts import Rollout
from megatron_selfdistill.sources.signals import Signals, Terms


@dataclass(frozen=True)
class OpsaSettings(ClipSettings):
    """The settings of OPSA."""

    threshold: Annotated[float, above(0), at_most(1)] = 0.1
    """Probability of a sampled token, under the distribution that it was sampled from, below which the token gets the
    negative advantage."""
    penalty: PositiveFloat = 1.0
    """Size of the negative advantage."""

    needs = Needs(teacher_prompt=None, log_probs=SAMPLED)


class Opsa(SelfDistillation):
    """On-policy self-adaptation."""

    Settings = OpsaSettings

    def terms(self, step: int, rollouts: Sequence[Rollout], signals: Signals) -> Terms:
        """Return the advantages of `opsa`."""
        return opsa(signals, threshold=self.settings.threshold, penalty=self.settings.penalty)


def opsa(signals: Signals, *, threshold: float, penalty: float) -> Terms:
    """Return the advantage ``-penalty`` for the tokens with mu < ``threshold``, and 0 for the others."""
    unlikely = signals.sampled_log_prob < math.log(threshold)
    return Terms.of(
        signals.sampled_log_prob, advantage=torch.where(unlikely, -penalty, 0.0).to(signals.sampled_log_prob)
    )
