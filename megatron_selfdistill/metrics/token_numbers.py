# Copyright (c) 2026 the megatron_selfdistill authors. Apache-2.0.
"""The loss's numbers of selected response tokens, gathered from the ranks of one replica."""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.distributed as dist

from megatron_selfdistill.distributed.ranks import RankGrid
from megatron_selfdistill.metrics.samples import NUMBERS
from megatron_selfdistill.pipeline.batch import over_last_stage
from megatron_selfdistill.pipeline.schedule import StepOutput


def token_numbers(output: StepOutput, spans: Sequence[range], grid: RankGrid) -> list[dict[str, list[float]]]:
    """Return, for each span of ``PackedBatch.response_tokens``, one float64 per token for each of `NUMBERS`.

    ``spans``: ascending ranges without a common index, equal on all ranks of the replica.  Every rank of the replica
    gets the values, which lie on the last pipeline stage, spread over its context-parallel ranks.
    Collectives, of 5 float64 per token: `over_last_stage`, then a broadcast over the pipeline.
    """
    wanted = torch.tensor([index for span in spans for index in span], dtype=torch.int64)
    values = torch.zeros(len(NUMBERS), len(wanted), dtype=torch.float64, device=grid.device)
    if grid.is_last_stage:
        if output.stats is not None:
            held = output.response_ids.cpu()
            found = torch.isin(held, wanted).nonzero().squeeze(1)
            places = torch.searchsorted(wanted, held[found])
            for known, name in zip(values, NUMBERS, strict=True):
                known[places.to(grid.device)] = getattr(output.stats, name)[found.to(grid.device)].double()
        values = over_last_stage(values, grid)
    if grid.pp_size > 1:
        dist.broadcast(values, grid.last_stage_rank, group=grid.pp_group)
    per_span = torch.split(values.cpu(), [len(span) for span in spans], dim=1)
    return [dict(zip(NUMBERS, part.tolist(), strict=True)) for part in per_span]
