# Copyright (c) 2026 the megatron_selfdistill authors. Apache-2.0.
"""Collectives over integers of the host, which waits for their results."""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.distributed as dist


def max_over_ranks(values: Sequence[int], group: dist.ProcessGroup | None = None) -> list[int]:
    """Return the maximum of each value over the ranks of ``group`` (None: the world).

    Every rank passes the same number of values.  Collectives: one all-reduce of int64, for whose result the host waits.
    """
    maxima = torch.tensor([int(value) for value in values], dtype=torch.int64, device=device_of_world())
    dist.all_reduce(maxima, op=dist.ReduceOp.MAX, group=group)
    return maxima.tolist()


def min_over_ranks(values: Sequence[int], group: dist.ProcessGroup | None = None) -> list[int]:
    """Return the minimum of each value over the ranks of ``group``; see `max_over_ranks`."""
    return [-value for value in max_over_ranks([-value for value in values], group)]


def gather_integers(values: Sequence[int], group: dist.ProcessGroup | None = None) -> list[list[int]]:
    """Return the ``values`` of each rank of ``group`` (None: the world), in the order of its ranks.

    The ranks may have different numbers of values.  Collectives: a maximum, and an all-gather of int64 that is as long
    as the longest ``values``; the host waits for both.
    """
    (longest,) = max_over_ranks([len(values)], group)
    padding = [0] * (longest - len(values))
    mine = torch.tensor([len(values), *values, *padding], dtype=torch.int64, device=device_of_world())
    parts = [torch.empty_like(mine) for _ in range(dist.get_world_size(group))]
    dist.all_gather(parts, mine, group=group)
    return [rest[:count] for count, *rest in torch.stack(parts).tolist()]


def device_of_world() -> torch.device:
    """Return the device from which the world's process group takes tensors."""
    on_gpu = dist.get_backend() == "nccl"
    return torch.device("cuda", torch.cuda.current_device()) if on_gpu else torch.device("cpu")
