# Copyright (c) 2026 the megatron_selfdistill authors. Apache-2.0.
"""The numbers of selected response tokens, gathered from the ranks of one replica."""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.distributed as dist
from torch import Tensor

from megatron_selfdistill.distributed.ranks import RankGrid
from megatron_selfdistill.metrics.samples import NUMBERS
from megatron_selfdistill.pipeline.batch import over_last_stage
from megatron_selfdistill.pipeline.step_output import StepOutput


def token_numbers(output: StepOutput, spans: Sequence[range], grid: RankGrid) -> list[dict[str, list[float]]]:
    """Return, for each span of ``PackedBatch.response_tokens``, one float64 per token for each of `NUMBERS`.

    ``spans``: ascending ranges without a common index, equal on all ranks of the replica.  Every rank of the replica
    gets the values.
    Collectives: those of `gathered_rows`, of 5 float64 per token.
    """
    stats = output.stats
    held = None if stats is None else torch.stack([getattr(stats, name).double() for name in NUMBERS], 1)
    values = gathered_rows(held, output.response_ids, spans, len(NUMBERS), grid).t()
    per_span = torch.split(values.cpu(), [len(span) for span in spans], dim=1)
    return [dict(zip(NUMBERS, part.tolist(), strict=True)) for part in per_span]


def gathered_rows(
    held: Tensor | None, response_ids: Tensor, spans: Sequence[range], width: int, grid: RankGrid
) -> Tensor:
    """Return the rows [n, width], float64 on the device, of the n response tokens of ``spans``, one span after another.

    ``held``: the rows [R, width] of the tokens ``response_ids [R]``, which lie on the last pipeline stage, spread over
    its context-parallel ranks; None on the other stages.  ``spans``: as for `token_numbers`.  Every rank of the replica
    gets the rows.
    Collectives: `over_last_stage`, then a broadcast over the pipeline.
    """
    wanted = torch.tensor([index for span in spans for index in span], dtype=torch.int64)
    values = torch.zeros(len(wanted), width, dtype=torch.float64, device=grid.device)
    if grid.is_last_stage:
        if held is not None:
            ids = response_ids.cpu()
            found = torch.isin(ids, wanted).nonzero().squeeze(1)
            places = torch.searchsorted(wanted, ids[found])
            values[places.to(grid.device)] = held[found.to(grid.device)]
        values = over_last_stage(values, grid)
    if grid.pp_size > 1:
        dist.broadcast(values, grid.last_stage_rank, group=grid.pp_group)
    return values
