# Copyright (c) 2026 the megatron_selfdistill authors. Apache-2.0.
"""The betas at which the first pass takes moments, as numbers that the sums can hold."""

from __future__ import annotations

import math
from dataclasses import dataclass
from functools import lru_cache

import torch
from torch import Tensor

from megatron_selfdistill.loss.target import RANGE, Target


def beta_grid(target: Target, unit: float = 1.0) -> tuple[float, ...]:
    """Return the betas, rising, at which the first pass takes the entropy of the mix; the ends are `Target.beta_range`.

    The values are 1 / (1 + w) times powers of 2, so that equal logits find their root on the grid, from
    1 / (RANGE (1 + w)) to RANGE / (1 + w); with a bound inside that range they start at 1 / k_max.  These are 9 values
    without a bound and 5 with k_max = 1 + w.  Under fixed and teacher_alone the grid is the one given beta.
    ``unit``: the betas are those of m / unit, see `mix_unit`.
    """
    if target.rule in ("fixed", "teacher_alone"):
        return (_given_beta(target, unit),)
    octaves = round(math.log2(RANGE))
    # A power of 2 times one number, so that each value is exactly twice the one before.
    grid = [2.0**j * (unit / target.geometric_k) for j in range(-octaves, octaves + 1)]
    if not target.lowest_is_bound:
        return tuple(grid)
    assert target.k_bound is not None
    lowest = unit / target.k_bound
    return (lowest, *(beta for beta in grid if beta > lowest * (1 + 1e-9)))


def mix_unit(target: Target) -> float:
    """Return the number by which the mix is divided before it reaches the passes: 1 + w with a reference, else 1.

    With a reference, the passes receive the logits m / (1 + w) = (w t + r) / (1 + w) in place of the teacher's.  Their
    magnitude is that of logits, and their grid of betas is the same for every w.
    """
    return target.geometric_k if target.is_anchored else 1.0


def _given_beta(target: Target, unit: float) -> float:
    """Return `Target.given_beta` of m / unit: exactly 1 for k = unit."""
    assert target.given_beta is not None
    return (
        unit / target.geometric_k if target.k is None and target.rule != "teacher_alone" else unit * target.given_beta
    )


@dataclass(frozen=True)
class BetaGrid:
    """The quantities that the first pass computes for every token; equal on all ranks.

    betas: J values at which moments are taken, each one a number of ``dtype``.
    num_grid: the number of leading betas that are ``beta_grid(target)``; under "batch" the given beta follows.
    favoured: index of the beta nearest to 1 / (1 + w), at which equal logits have their root.
    doubled: indices of the betas that are twice the beta before, whose exponentials may be computed as squares.
    given: whether the rule gives beta, which is betas[-1], and solves nothing.
    lowest_is_bound: see `Target.lowest_is_bound`.
    mix_weights: (weight of t, weight of s) in m; (1, 0) with a reference, where the mix comes in place of t.
    unit: see `mix_unit`; ``betas`` are those of m / unit.
    dtype: the dtype of the sums, float32 or float64.
    """

    betas: tuple[float, ...]
    num_grid: int
    favoured: int
    doubled: tuple[int, ...]
    given: bool
    lowest_is_bound: bool
    mix_weights: tuple[float, float]
    unit: float
    dtype: torch.dtype

    @classmethod
    @lru_cache(maxsize=64)
    def of(cls, target: Target, dtype: torch.dtype) -> BetaGrid:
        """Return the grid of a target; powers of 2 between its betas stay exact in ``dtype``.

        The result is cached: a run has one target and asks for its grid at every call of the loss.
        """
        unit = mix_unit(target)
        grid = beta_grid(target, unit)
        asked = grid if target.rule != "batch" else (*grid, _given_beta(target, unit))
        betas = torch.tensor(asked, dtype=torch.float64).to(dtype).tolist()
        favoured = min(range(len(grid)), key=lambda j: abs(betas[j] * target.geometric_k - unit))
        return cls(
            betas=tuple(betas),
            num_grid=len(grid),
            favoured=favoured,
            doubled=tuple(j for j in range(1, len(betas)) if j != favoured and betas[j] == 2 * betas[j - 1]),
            given=target.given_beta is not None,
            lowest_is_bound=target.lowest_is_bound,
            mix_weights=(1.0, 0.0) if target.is_anchored else target.mix_weights,
            unit=unit,
            dtype=dtype,
        )

    @property
    def num_sums(self) -> int:
        """The number of sums of the first pass besides FIRST_PASS: four moments of each beta and two token logits."""
        return 4 * len(self.betas) + 2

    def on(self, device: torch.device, dtype: torch.dtype | None = None) -> Tensor:
        """Return ``betas`` as a tensor [J] in ``dtype``, by default in the dtype of the sums.

        The tensor is cached: the caller must not write to it.
        """
        return _on(self.betas, dtype or self.dtype, device)

    def reported(self, device: torch.device) -> Tensor:
        """Return the betas of m that `beta_grid` names, [num_grid] in the dtype of the sums, cached as by `on`."""
        return _on(tuple(beta / self.unit for beta in self.betas[: self.num_grid]), self.dtype, device)


@lru_cache(maxsize=64)
def _on(betas: tuple[float, ...], dtype: torch.dtype, device: torch.device) -> Tensor:
    """Return the betas on a device, from a cache.

    A copy from the host makes a GPU wait, and thousands of calls use the same betas.  The first call may run under
    inference mode, whose tensors autograd would refuse in later calls, so the tensor is made outside of that mode.
    """
    with torch.inference_mode(False):
        return torch.tensor(betas, dtype=dtype, device=device)
