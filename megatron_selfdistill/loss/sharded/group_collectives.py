# Copyright (c) 2026 the megatron_selfdistill authors. Apache-2.0.
"""Collectives of a tensor-parallel group, under the names that the installed torch has for them."""

from __future__ import annotations

from typing import Any

import torch.distributed as dist
from torch import Tensor


def all_gather(out: Tensor, part: Tensor, group: dist.ProcessGroup | None, *, async_op: bool = False) -> Any:
    """Gather ``part`` of every rank into ``out`` along dimension 0; return a handle if ``async_op``.

    torch 2.13 renames all_gather_into_tensor to all_gather_single and warns at every call of the old name.
    """
    gather = getattr(dist, "all_gather_single", None) or dist.all_gather_into_tensor
    return gather(out, part, group=group, async_op=async_op)


def reduce_scatter(out: Tensor, parts: Tensor, group: dist.ProcessGroup | None) -> Any:
    """Start to sum ``parts`` over the ranks into the ``out`` of each rank; return a handle.

    torch 2.13 renames reduce_scatter_tensor to reduce_scatter_single, see `all_gather`.
    """
    reduce = getattr(dist, "reduce_scatter_single", None) or dist.reduce_scatter_tensor
    return reduce(out, parts, group=group, async_op=True)


def group_size(group: dist.ProcessGroup | None) -> int:
    """Return the number of ranks of the group; 1 for None."""
    return 1 if group is None else dist.get_world_size(group)
