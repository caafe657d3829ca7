# Copyright (c) 2026 the megatron_selfdistill authors. Apache-2.0.
"""Uni-OPD: the teacher's log-ratio as an advantage, shifted so that right responses lie above wrong ones."""

from __future__ import annotations

import torch
from torch import Tensor

from megatron_selfdistill.recipes.signals import Signals, Terms


def uni_opd(signals: Signals, *, weight: float, margin: float, gap: str, max_log_ratio: float) -> Terms:
    """Return the advantage of Uni-OPD: log q - log mu of every token, plus the `margin_shift` of its response.

    Tokens whose |log q - log mu| is at least ``max_log_ratio`` have an advantage of 0, and so have the tokens of
    responses without a hint.  Needs `Signals.target_log_prob`.
    Source: Uni-OPD (arXiv 2605.03677) and its published code.
    """
    assert signals.target_log_prob is not None, "uni_opd needs a measuring pass"
    log_ratio = signals.target_log_prob - signals.sampled_log_prob
    shift = margin_shift(signals, signals.mean_per_sample(log_ratio), margin, gap)
    counts = signals.per_token(signals.hinted) & (log_ratio.abs() < max_log_ratio)
    advantage = torch.where(counts, log_ratio + signals.per_token(shift), 0.0)
    return Terms.of(signals.sampled_log_prob, advantage=weight * advantage)


def margin_shift(signals: Signals, mean_log_ratio: Tensor, margin: float, gap: str) -> Tensor:
    """Return the shift [B] that puts the right responses of each group at least ``margin`` above its wrong ones.

    The gap of a group is the mean of ``mean_log_ratio [B]`` over the right responses minus the mean over the wrong ones
    ("mean"), or the least right minus the greatest wrong value ("min_max").  Where the gap is below the margin, the
    right responses get half of the difference, and the wrong ones lose the other half.  Responses without a hint do not
    count, and a group that lacks either kind has no shift.
    """
    kinds = signals.right & signals.hinted, ~signals.right & signals.hinted
    counts = [signals.sum_per_group(kind.to(mean_log_ratio)) for kind in kinds]
    if gap == "mean":
        sums = [signals.sum_per_group(torch.where(kind, mean_log_ratio, 0.0)) for kind in kinds]
        right, wrong = (total / count for total, count in zip(sums, counts, strict=True))
    else:
        bound = mean_log_ratio.new_full((signals.num_groups,), torch.inf)
        least = torch.where(kinds[0], mean_log_ratio, torch.inf)
        greatest = torch.where(kinds[1], mean_log_ratio, -torch.inf)
        right = bound.scatter_reduce(0, signals.groups, least, "amin")
        wrong = (-bound).scatter_reduce(0, signals.groups, greatest, "amax")
    both = (counts[0] > 0) & (counts[1] > 0)
    missing = torch.where(both, (margin - (right - wrong)).clamp(min=0), 0.0)
    half = missing[signals.groups] / 2
    return torch.where(kinds[0], half, torch.where(kinds[1], -half, 0.0))
