# Copyright (c) 2026 the megatron_selfdistill authors. Apache-2.0.
"""SCOPE: right responses teach by likelihood, wrong ones by the teacher, weighted by perplexity within their group.

Algorithm: Each problem gets 8 responses. Right responses raise their own likelihood. Wrong responses follow the
teacher, which sees the solution, at their sampled tokens. Both are weighted within their group by perplexity.

Equation:

    w = 0
    right response i:  a = rho PPL_S(i)^(1/tau) / sum over the right responses
    wrong response i:  a = rho (log q - log p) PPL_T(i)^(-1/tau) / sum over the wrong responses
    PPL = exp(-mean log-prob of the tokens) under student or teacher
    sums go over the group; all times N / (number of problems)

Paper: SCOPE (arXiv 2604.10688). Published are formulas, responses, batch, temperature, learning rate and tau.

Differences: Ours: the frozen weights behind the solution are the teacher (published: a larger model without a hint).

Expected: 100 steps of 4 x 8 responses raise the sampled accuracy from .36 to .67 on subtraction and from .51 to .91 on
additions (docs/recipes/comparison.md).

Known failure:
- Sums over tokens favour long responses.
- A single right response of a group has a weight of 1, whatever it is.
- method.clip_low and method.clip_high must stay null: the weights of right responses are no advantages.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from megatron_selfdistill.config.schema.method_config import MEASURED, Needs
from megatron_selfdistill.config.schema.ranges import NonNegativeFloat, Temperature
from megatron_selfdistill.methods.default import SelfDistillation
from megatron_selfdistill.methods.parts.settings import AdvantageSettings, DistillSettings, SelectSettings
from megatron_selfdistill.methods.parts.terms import with_rewards
from megatron_selfdistill.sources.rollouts import Rollout
from megatron_selfdistill.sources.signals import Signals, Terms


@dataclass(frozen=True)
class ScopeSettings(DistillSettings, AdvantageSettings, SelectSettings):
    """The settings of SCOPE."""

    weight: NonNegativeFloat = 0.0
    """Weight of the advantages of rewards beside the method; 0 adds none."""
    tau: Temperature = 1.0
    """Temperature of the weights of responses."""

    needs = Needs(log_probs=MEASURED, rewards=True, group_size=2)
    required = ("environment.max_turns=1",)


class Scope(SelfDistillation):
    """SCOPE."""

    Settings = ScopeSettings

    def terms(self, step: int, rollouts: Sequence[Rollout], signals: Signals) -> Terms:
        """Return the terms of `scope`, plus advantages of rewards where they have a weight."""
        own = self.settings
        return with_rewards(scope(signals, weight=own.distill_weight, tau=own.tau), signals, own)


def scope(signals: Signals, *, weight: float, tau: float) -> Terms:
    """Return the terms of SCOPE (arXiv 2604.10688, equations 2 to 6).

    A wrong response without a hint has a weight of 0 and does not count in the sum.  Needs both log-probs of a
    measuring pass.  The paper sums over tokens and averages over problems: loss.normalize=prompts.
    """
    assert signals.student_log_prob is not None and signals.target_log_prob is not None, "scope needs a measuring pass"
    like, right = signals.sampled_log_prob, signals.right
    by_student = group_shares(signals, -signals.mean_per_sample(signals.student_log_prob) / tau, right)
    by_teacher = group_shares(signals, signals.mean_per_sample(signals.target_log_prob) / tau, ~right & signals.hinted)
    return Terms.of(
        like, advantage=weight * signals.per_token(by_student), sampled_kl=weight * signals.per_token(by_teacher)
    )


def group_shares(signals: Signals, scores: Tensor, chosen: Tensor) -> Tensor:
    """Return exp(score) over its sum in the group, [B], among the ``chosen [B]`` responses; 0 for the others."""
    scores = torch.where(chosen, scores, -torch.inf)
    largest = scores.new_full((signals.num_groups,), -torch.inf).scatter_reduce(0, signals.groups, scores, "amax")
    shares = torch.where(chosen, (scores - largest[signals.groups]).exp(), 0.0)
    return torch.where(chosen, shares / signals.sum_per_group(shares)[signals.groups], 0.0)
