# Copyright (c) 2026 the megatron_selfdistill authors. Apache-2.0.
"""The betas at which the first pass takes moments, as numbers that the sums can hold."""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache

import torch
from torch import Tensor

from megatron_selfdistill.loss.target import Target, beta_grid


@dataclass(frozen=True)
class Grid:
    """What is asked of every row; equal on all ranks.

    betas: J values at which moments are taken, each one a number of ``dtype``.
    num_grid: the first of them are ``beta_grid(target)``; under "batch" the given beta follows.
    favoured: index of the beta nearest to 1 / (1 + w), where equal logits have their root.
    octave: distance of indices over which betas double, 1; 2 where the grid has two points per octave.
    doubled: indices of those that are twice the one ``octave`` before: their exponentials may be squares of its own.
    given: whether the rule gives beta, betas[-1], and solves nothing.
    lowest_is_bound: as in ``Target``.
    mix_weights: (weight of t, weight of s) in m.
    one_pass: whether rows are finished from the first pass alone, which then takes E_p[x] too; with_forward_kl: and,
        for each beta, the moments of y under q.  False where a second pass follows.
    dtype: of the sums, float32 or float64.
    """

    betas: tuple[float, ...]
    num_grid: int
    favoured: int
    octave: int
    doubled: tuple[int, ...]
    given: bool
    lowest_is_bound: bool
    mix_weights: tuple[float, float]
    dtype: torch.dtype
    one_pass: bool = False
    with_forward_kl: bool = False

    @classmethod
    @lru_cache(maxsize=64)
    def of(cls, target: Target, dtype: torch.dtype, *, one_pass: bool = False, with_forward_kl: bool = False) -> Grid:
        """Of a target; powers of 2 between its betas stay exact in ``dtype``.  Kept: a run has one, and asks for it at
        every call of the loss."""
        octave = 2 if one_pass and target.given_beta is None else 1
        grid = beta_grid(target, octave)
        asked = grid if target.rule != "batch" else (*grid, target.given_beta)
        betas = torch.tensor(asked, dtype=torch.float64).to(dtype).tolist()
        favoured = min(range(len(grid)), key=lambda j: abs(betas[j] * target.geometric_k - 1))
        return cls(
            betas=tuple(betas),
            num_grid=len(grid),
            favoured=favoured,
            octave=octave,
            doubled=tuple(j for j in range(octave, len(betas)) if j != favoured and betas[j] == 2 * betas[j - octave]),
            given=target.given_beta is not None,
            lowest_is_bound=target.lowest_is_bound,
            mix_weights=target.mix_weights,
            dtype=dtype,
            one_pass=one_pass,
            with_forward_kl=one_pass and with_forward_kl,
        )

    @property
    def num_sums(self) -> int:
        """Columns after those of ``row_sums.FIRST_PASS``: moments, joint moments, the two token logits."""
        num_betas = len(self.betas)
        return 4 * num_betas + self.one_pass + 2 * num_betas * self.with_forward_kl + 2

    def on(self, device: torch.device) -> Tensor:
        """``betas`` as a tensor [J] in ``dtype``; not to be written to."""
        return _on(self.betas, self.dtype, device)


@lru_cache(maxsize=64)
def _on(betas: tuple[float, ...], dtype: torch.dtype, device: torch.device) -> Tensor:
    """Kept: a copy from the host makes a GPU wait, and betas are the same for thousands of calls.

    The first of these may be made under inference mode, whose tensors autograd would refuse in the others.
    """
    with torch.inference_mode(False):
        return torch.tensor(betas, dtype=dtype, device=device)
