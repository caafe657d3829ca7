# Copyright (c) 2026 the megatron_selfdistill authors. Apache-2.0.
"""The one k of a batch for target.rule=batch, from the entropies of the step before.

The rule "batch" has one k for a whole step, from the mean entropies of the step before.  The mean entropy of the mix is
known at the few betas of the grid.  Between them `solve_batch_k` interpolates it over log beta by a monotone cubic
(Fritsch and Carlson 1980, doi 10.1137/0717021).
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from itertools import pairwise

import torch
from torch import Tensor

from megatron_selfdistill.loss.target import MIN_ENTROPY


def solve_batch_k(
    mean_student_entropy: float,
    betas: Sequence[float] | Tensor,
    mean_grid_entropies: Sequence[float] | Tensor,
    k_max: float | None,
    *,
    max_entropy: float = math.inf,
) -> float:
    """Return an estimate of the k at which the mean entropies of mix and student are equal, at most ``k_max``.

    betas: rising.  mean_grid_entropies[j]: the mean over tokens of H(softmax(betas[j] m)), of which the tokens' values
    are `TokenStats.grid_entropies`.  All entropies are in nats.
    max_entropy: log of the number of valid columns.  The interpolated quantity is the logit-entropy
    log H - log(1 - H / max_entropy), which is log H for the default.
    Accuracy: the mean entropy at k is exact at grid points.  On the classes of ``tests/support/distributions.py`` it is
    within 0.02 nats where student and teacher are alike, and within 0.25 nats where all tokens melt from a few columns
    into the bulk, or settle on a plateau, in one cell of the grid.  The rule uses k for the tokens of the next step,
    which differ by more.  Beyond the grid, k belongs to the nearer end.
    Raises: ValueError for means that are not finite, or whose number differs from the number of betas.
    """
    positions = torch.as_tensor(betas, dtype=torch.float64, device="cpu").log()
    entropies = torch.as_tensor(mean_grid_entropies, dtype=torch.float64, device="cpu")
    rises = positions.dim() == 1 and bool(positions.isfinite().all() and (positions.diff() > 0).all())
    if positions.shape != entropies.shape or positions.numel() < 2 or not rises:
        raise ValueError(
            "solve_batch_k: betas, above 0 and rising, and mean_grid_entropies must be equally long, at least 2; "
            f"got {betas} and {positions.numel()} and {entropies.numel()}."
        )
    wanted = torch.tensor(float(mean_student_entropy), dtype=torch.float64)
    if not (torch.isfinite(wanted) and torch.isfinite(entropies).all()):
        raise ValueError(
            f"solve_batch_k: mean entropies must be finite; got {float(wanted)} and {entropies.tolist()}. "
            "Leave tokens with NaN out of the means."
        )
    heights = _logit(entropies, max_entropy) - _logit(wanted.clamp(min=MIN_ENTROPY), max_entropy)
    heights = heights.cummin(0).values  # H falls as beta rises; rounding may say otherwise
    k = math.exp(-_monotone_cubic_root(positions.tolist(), heights.tolist()))
    return k if k_max is None else min(k, k_max)


def _logit(entropies: Tensor, max_entropy: float) -> Tensor:
    return entropies.clamp(min=1e-30).log() - (1 - entropies / max_entropy).clamp(min=1e-12).log()


def _monotone_cubic_root(positions: list[float], heights: list[float]) -> float:
    """Return the position at which the monotone cubic through falling heights is 0; without a root, the nearer end."""
    if heights[0] <= 0:
        return positions[0]
    if heights[-1] >= 0:
        return positions[-1]
    cell = sum(height > 0 for height in heights) - 1
    widths = [b - a for a, b in pairwise(positions)]
    secants = [(b - a) / h for a, b, h in zip(heights, heights[1:], widths, strict=False)]

    def slope(i: int) -> float:
        if i in (0, len(secants)):
            return secants[min(i, len(secants) - 1)]
        before, after = secants[i - 1], secants[i]
        return 2 * before * after / (before + after) if before * after > 0 else 0.0

    width, start, end = widths[cell], heights[cell], heights[cell + 1]
    first, last = slope(cell) * width, slope(cell + 1) * width
    left, right = 0.0, 1.0
    for _ in range(60):
        x = (left + right) / 2
        value = start + x * (
            first + x * (3 * (end - start) - 2 * first - last + x * (2 * (start - end) + first + last))
        )
        left, right = (x, right) if value > 0 else (left, x)
    return positions[cell] + width * (left + right) / 2
