# Copyright (c) 2026 the megatron_selfdistill authors. Apache-2.0.
"""Requests pooled over replicas, responses handed back, errors that all ranks learn."""

from __future__ import annotations

import math

import layouts
import pytest
import torch.distributed as dist

from megatron_selfdistill.config import ConfigError
from megatron_selfdistill.rollout.base import Request, Response
from megatron_selfdistill.rollout.engine import EngineError
from megatron_selfdistill.rollout.exchange import agreement, hand_back, pool


def requests_of(replica: int, count: int) -> list[Request]:
    return [
        Request([replica, i, *range(3 * i)], 2**64 - 1 - 10 * replica - i, [7, i] if (replica + i) % 2 else None)
        for i in range(count)
    ]


def response_to(request: Request) -> Response:
    """A response that tells what it answers."""
    length = len(request.prompt) - 2
    teacher = request.teacher_prompt
    return Response(
        token_ids=[request.stream % 1000] * length,
        log_probs=[-math.pi] * length,
        sampled_log_probs=[math.nan] * length,
        finish_reason="stop" if length % 2 else "length",
        teacher_log_probs=None if teacher is None else [-1 / 3] * length,
        weight_version=None if teacher is None else 12,
    )


def exchange(counts: list[int], tp: int, fault: str | None) -> list[str]:
    """What each rank's replica got back, where response i is written by rank i % world."""
    grid = layouts.grid(tp)
    mine = requests_of(grid.dp_rank, counts[grid.dp_rank])
    pooled = pool(mine, grid)
    rank, world = dist.get_rank(), dist.get_world_size()
    written = {i: response_to(r) for i, r in enumerate(pooled.requests) if i % world == rank}
    if fault == "missing" and rank == 1:
        written.pop(1)
    if fault == "twice" and rank == 1:
        written[0] = response_to(pooled.requests[0])
    try:
        back = hand_back(written, pooled)
    except EngineError as error:
        return [str(error)]
    assert repr(back) == repr([response_to(r) for r in mine])
    return [repr(pooled.requests)]
