# Copyright (c) 2026 the megatron_selfdistill authors. Apache-2.0.
"""SCOPE: right responses teach by likelihood, wrong ones by the teacher, weighted by perplexity within their group."""

from __future__ import annotations

import torch
from torch import Tensor

from megatron_selfdistill.recipes.signals import Signals, Terms


def scope(signals: Signals, *, weight: float, tau: float) -> Terms:
    """Return the terms of SCOPE, which weighs responses by PPL = exp(-mean log-prob of their tokens).

        right responses: likelihood of their tokens with rho, weight PPL_p^(1 / tau) / sum over the group's right ones
        wrong responses: sampled reverse KL to q with rho, weight PPL_q^(-1 / tau) / sum over the group's wrong ones

    A right response has more weight where the student finds it unlikely, and a wrong response where the teacher finds
    it likely, because the teacher's corrections of such a response can be trusted.  A wrong response without a hint has
    a weight of 0 and does not count in the sum.  Needs both log-probs of a measuring pass.  The paper sums over tokens
    and averages over problems: loss.normalize=prompts.
    Source: SCOPE (arXiv 2604.10688), equations 2 to 6.
    """
    assert signals.student_log_prob is not None and signals.target_log_prob is not None, "scope needs a measuring pass"
    like, right = signals.sampled_log_prob, signals.right
    by_student = group_shares(signals, -signals.mean_per_sample(signals.student_log_prob) / tau, right)
    by_teacher = group_shares(signals, signals.mean_per_sample(signals.target_log_prob) / tau, ~right & signals.hinted)
    return Terms.of(
        like,
        advantage=weight * signals.per_token(by_student),
        sampled_kl=weight * signals.per_token(by_teacher),
    )


def group_shares(signals: Signals, scores: Tensor, chosen: Tensor) -> Tensor:
    """Return exp(score) over its sum in the group, [B], among the ``chosen [B]`` responses; 0 for the others."""
    scores = torch.where(chosen, scores, -torch.inf)
    largest = scores.new_full((signals.num_groups,), -torch.inf).scatter_reduce(0, signals.groups, scores, "amax")
    shares = torch.where(chosen, (scores - largest[signals.groups]).exp(), 0.0)
    total = signals.sum_per_group(shares)[signals.groups]
    return torch.where(chosen, shares / total, 0.0)
