# Copyright (c) 2026 the megatron_selfdistill authors. Apache-2.0.
"""How likely the logged turns of a step are for the student, and which of them were taken for unlikely."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import TYPE_CHECKING

import torch
import torch.distributed as dist

from megatron_selfdistill.batch import over_last_stage

if TYPE_CHECKING:  # a run's metrics are read where there is no Megatron
    from megatron_selfdistill.parallel import Grid
    from megatron_selfdistill.schedule import StepOutput


def turn_ids(lengths: Sequence[int]) -> torch.Tensor:
    """[sum of lengths] int64: the turn of each response token, counted from 0."""
    return torch.repeat_interleave(torch.arange(len(lengths)), torch.tensor(lengths, dtype=torch.int64))


def turn_metrics(
    output: StepOutput, lengths: Sequence[int], accepted: Sequence[bool], weighted: bool, grid: Grid
) -> dict[str, float]:
    """Over the turns of the global batch, under flat keys; equal on all ranks.

    ``lengths``, ``accepted``: tokens of each of this replica's turns, in the order of ``PackedBatch.response_tokens``,
    and whether it is the accepted one.  ``weighted``: unlikely turns were weighted in this step.

        turns/count
        turns/log_prob_mean, turns/log_prob_min   of the turns' mean log-prob per token under the student, nats
        turns/accepted_share, turns/accepted_token_share   of the turns, of their tokens
        turns/unlikely_share, turns/unlikely_token_share   those whose weight in the loss is below 1; only with
                                                           ``weighted``

    Collectives: of the per-turn sums one over CP and TP, then a sum and a minimum over the world, and a broadcast.
    """
    totals = torch.zeros(7, dtype=torch.float64, device=grid.device)
    lowest = torch.full((1,), math.inf, dtype=torch.float64, device=grid.device)
    if output.stats is not None:
        sums = torch.zeros(2, len(lengths), dtype=torch.float64, device=grid.device)
        turns = turn_ids(lengths)[output.response_ids.cpu()].to(grid.device)
        sums[0].index_add_(0, turns, output.stats.student_log_prob.double())
        if output.weights is not None:
            sums[1].index_add_(0, turns, (output.weights < 1).double())
        sums = over_last_stage(sums, grid)
        if grid.tp_rank == 0 and grid.cp_rank == 0 and lengths:
            tokens = torch.tensor(lengths, dtype=torch.float64, device=grid.device)
            chosen = torch.tensor(accepted, dtype=torch.float64, device=grid.device)
            means, unlikely = sums[0] / tokens, (sums[1] > 0).double()
            parts = (torch.ones_like(tokens), tokens, means, chosen, chosen * tokens, unlikely, unlikely * tokens)
            totals += torch.stack([part.sum() for part in parts])
            lowest[0] = means.min()
    if grid.world_size > 1:
        dist.all_reduce(totals)
        dist.all_reduce(lowest, op=dist.ReduceOp.MIN)
        both = torch.cat([totals, lowest])
        dist.broadcast(both, src=0)  # an all-reduce need not give every rank the same bits
        totals, lowest = both[:-1], both[-1:]
    count, num_tokens, log_prob, num_accepted, accepted_tokens, num_unlikely, unlikely_tokens = totals.tolist()
    if not count:
        return {}
    metrics = {
        "turns/count": count,
        "turns/log_prob_mean": log_prob / count,
        "turns/log_prob_min": float(lowest[0]),
        "turns/accepted_share": num_accepted / count,
        "turns/accepted_token_share": accepted_tokens / num_tokens,
    }
    if weighted:
        metrics["turns/unlikely_share"] = num_unlikely / count
        metrics["turns/unlikely_token_share"] = unlikely_tokens / num_tokens
    return metrics
