# Copyright (c) 2026 the megatron_selfdistill authors. Apache-2.0.
"""The entropies of a global batch, from which target.rule=batch solves one k."""

from __future__ import annotations

import torch

from megatron_selfdistill.distributed.ranks import RankGrid
from megatron_selfdistill.metrics.step import holds_tokens, over_all_ranks
from megatron_selfdistill.pipeline.token_losses import StepOutput

MAX_GRID = 16
"""The largest number of betas in a target's grid."""


def batch_entropies(output: StepOutput, grid: RankGrid) -> tuple[float, list[float], list[float]]:
    """Return (mean entropy that is wanted, betas, mean H(softmax(beta m)) at each beta) over the global batch.

    The wanted entropy is `TokenStats.wanted_entropy`.  The results are equal on all ranks.

    `loss.batch_k.solve_batch_k` takes these values for the rule "batch".  Tokens with NaN are skipped.
    Collectives as in `step_metrics`.
    """
    sums = torch.zeros(2 + MAX_GRID, dtype=torch.float64, device=grid.device)
    betas = torch.zeros(MAX_GRID, dtype=torch.float64, device=grid.device)
    stats = output.stats
    if stats is not None and holds_tokens(grid):
        num_betas = len(stats.grid_betas)
        betas[:num_betas] = stats.grid_betas.double()
        entropies = torch.cat([stats.wanted_entropy[:, None], stats.grid_entropies], dim=1).double()
        known = torch.isfinite(entropies).all(1)
        sums[0] = known.sum()
        sums[1 : 2 + num_betas] = torch.where(known[:, None], entropies, 0.0).sum(0)
    total, found = over_all_ranks(sums, betas, grid)
    grid_betas = [beta for beta in found if beta > 0]
    means = [value / total[0] for value in total[1 : 2 + len(grid_betas)]]
    return means[0], grid_betas, means[1:]
