# Copyright (c) 2026 the megatron_selfdistill authors. Apache-2.0.
"""The target of a row from its `LogitSummary` alone, by bisection in float64, as the explorer has it."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from megatron_selfdistill.instruments.explorer.logit_summary import LogitSummary
from megatron_selfdistill.loss import Target
from megatron_selfdistill.loss.target import MIN_ENTROPY


def weights_of(target: Target, num_models: int) -> list[float]:
    """Return the weight of each model in the mix m, in the order of a summary."""
    teacher, anchor = target.mix_weights
    weights = [0.0, teacher, 0.0, 0.0][:num_models]
    weights[2 if target.is_anchored else 0] += anchor
    if target.num_controls:
        weights[-1] = -teacher
    return weights


def log_sum(summary: LogitSummary, row: int, beta: float, weights: list[float]) -> tuple[float, float]:
    """Return log Z = log of the sum of e^(beta m), and the mean of beta m under e^(beta m) / Z."""
    w = torch.tensor(weights, dtype=torch.float64)
    used = w != 0
    mix = w[used] @ summary.logits[row, used]
    held = torch.isfinite(mix) & (summary.ids[row] >= 0)
    filled = summary.counts[row] > 0
    mu = (w @ summary.means[row])[filled]
    factors = [w[i] * w[j] * (1 if i == j else 2) for i in range(len(w)) for j in range(i, len(w))]
    variance = (torch.stack(factors) @ summary.covariances[row])[filled].clamp(min=0)
    x = torch.cat([beta * mix[held], summary.counts[row][filled].log() + beta * mu + beta**2 * variance / 2])
    energies = torch.cat([beta * mix[held], beta * mu + beta**2 * variance])
    log_z = x.logsumexp(0)
    return float(log_z), float(((x - log_z).exp() * energies).sum())


def entropy_at(summary: LogitSummary, row: int, beta: float, weights: list[float]) -> float:
    log_z, energy = log_sum(summary, row, beta, weights)
    return log_z - energy


def matching_beta(summary: LogitSummary, row: int, wanted: float, target: Target) -> float:
    """Return the beta in the target's range at which the mix has the entropy ``wanted``, or the nearer end."""
    if target.given_beta is not None:
        return target.given_beta
    weights, (low, high) = weights_of(target, summary.logits.shape[1]), target.beta_range
    wanted = max(wanted, MIN_ENTROPY)
    if entropy_at(summary, row, low, weights) <= wanted:
        return low
    if entropy_at(summary, row, high, weights) > wanted:
        return high
    left, right = math.log(low), math.log(high)
    for _ in range(40):
        middle = (left + right) / 2
        if entropy_at(summary, row, math.exp(middle), weights) > wanted:
            left = middle
        else:
            right = middle
    return math.exp((left + right) / 2)


def of_rows(rows: list[Tensor], vocab_size: int) -> LogitSummary:
    from megatron_selfdistill.instruments.explorer.logit_summary import summarise_logits
    from megatron_selfdistill.loss import VocabShard

    return summarise_logits(rows, VocabShard(0, vocab_size, vocab_size))
