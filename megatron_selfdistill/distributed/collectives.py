# Copyright (c) 2026 the megatron_selfdistill authors. Apache-2.0.
"""What one rank finds out or fails at, all ranks learn; so that none waits in a collective for one that has raised."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, TypeVar

import torch.distributed as dist

from megatron_selfdistill.errors import CheckpointError

T = TypeVar("T")


def on_rank_0(do: Callable[[], T]) -> T:
    """What ``do()`` returns on rank 0, pickled, on every rank.  What it raises there is raised on every rank, as a
    `CheckpointError`."""
    outcome: list[Any] = [None, None]
    if dist.get_rank() == 0:
        try:
            outcome[0] = do()
        except Exception as error:
            outcome[1] = describe(error)
    dist.broadcast_object_list(outcome, src=0)
    if outcome[1] is not None:
        raise CheckpointError(outcome[1])
    return outcome[0]


def on_each_rank(do: Callable[[], T]) -> T:
    """Return what ``do()`` returns here.

    If it raises on any rank, all ranks raise a `CheckpointError` that names those ranks and what happened there; where
    all ranks fail alike, it says so once.
    """
    result, problem = None, None
    try:
        result = do()
    except Exception as error:
        problem = describe(error)
    problems = {rank: one for rank, one in enumerate(from_all_ranks(problem)) if one is not None}
    if len(problems) == dist.get_world_size() and len(set(problems.values())) == 1:
        raise CheckpointError(problems[0])
    if problems:
        raise CheckpointError("; ".join(f"rank {rank}: {one}" for rank, one in list(problems.items())[:4]))
    return result  # type: ignore[return-value]


def from_all_ranks(value: T) -> list[T]:
    """``value`` of each rank, pickled, in the order of ranks."""
    gathered: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(gathered, value)
    return gathered


def describe(error: BaseException) -> str:
    """One line for a message: our own errors are sentences already."""
    return str(error) if isinstance(error, CheckpointError) else f"{type(error).__name__}: {error}"
