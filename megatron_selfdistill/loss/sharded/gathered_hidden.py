# Copyright (c) 2026 the megatron_selfdistill authors. Apache-2.0.
"""Hidden rows of tokens between the ranks of a tensor-parallel group: together for a GEMM, their gradients back."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch.distributed as dist
from torch import Tensor


@dataclass(frozen=True)
class HiddenPlacement:
    """Where the rows of the student's tokens lie.

    group: the tensor-parallel group; None for one rank.
    gather_indices: None where each rank holds all rows.  Else [R] int64, distinct: each rank holds [n, h] of its own, n
    equal on all ranks, and token i belongs to row gather_indices[i] of all ranks' rows in rank order.
    """

    group: dist.ProcessGroup | None
    gather_indices: Tensor | None

    @property
    def size(self) -> int:
        return group_size(self.group)

    def start_gather(self, held: Tensor) -> Callable[[], Tensor]:
        """[R, h] of all tokens from what the rank holds, while other work goes on; call what is returned to wait."""
        order = self.gather_indices
        if order is None:
            return lambda: held
        if self.size == 1 or len(held) == 0:
            return lambda: held.index_select(0, order)
        everyones = held.new_empty(self.size * held.shape[0], held.shape[1])
        handle = all_gather(everyones, held.contiguous(), self.group, async_op=True)

        def wait() -> Tensor:
            handle.wait()
            return everyones.index_select(0, order)

        return wait

    def start_reduce(self, gradient: Tensor, held: Tensor) -> Callable[[], Tensor]:
        """The sum over ranks of gradients [R, h] of all tokens' rows, while other work goes on; call what is returned
        to wait for it.  It has the shape of ``held``: rows that belong to no token get 0."""
        out = gradient
        if self.gather_indices is not None:
            everyones = gradient.new_zeros(self.size * held.shape[0], held.shape[1])
            gradient = everyones.index_copy_(0, self.gather_indices, gradient)
            out = gradient if self.size == 1 else gradient.new_empty(held.shape)
        if self.size == 1 or len(held) == 0:
            return lambda: out
        if self.gather_indices is not None:
            handle = reduce_scatter(out, gradient, self.group)
        else:
            handle = dist.all_reduce(out, group=self.group, async_op=True)

        def wait(summand: Tensor = gradient) -> Tensor:  # lives as long as it is being read
            handle.wait()
            return out

        return wait


def gather_width(part: Tensor, group: dist.ProcessGroup | None) -> Tensor:
    """[R, h] from the slices [R, h / tp] of the width that the ranks hold in their order."""
    size = group_size(group)
    if size == 1 or len(part) == 0:
        return part.repeat(1, size)
    slices = part.new_empty(size * part.shape[0], part.shape[1])
    all_gather(slices, part.contiguous(), group)
    return slices.unflatten(0, (size, part.shape[0])).transpose(0, 1).flatten(1)


def all_gather(out: Tensor, part: Tensor, group: dist.ProcessGroup | None, *, async_op: bool = False) -> Any:
    """Gather ``part`` of every rank into ``out``, along dimension 0; return a handle if ``async_op``.

    torch 2.13 renames all_gather_into_tensor to all_gather_single and warns at every call of the old name.
    """
    gather = getattr(dist, "all_gather_single", None) or dist.all_gather_into_tensor
    return gather(out, part, group=group, async_op=async_op)


def reduce_scatter(out: Tensor, everyones: Tensor, group: dist.ProcessGroup | None) -> Any:
    """Start to sum ``everyones`` over the ranks into each one's ``out``; return a handle.  See `all_gather`."""
    reduce = getattr(dist, "reduce_scatter_single", None) or dist.reduce_scatter_tensor
    return reduce(out, everyones, group=group, async_op=True)


def group_size(group: dist.ProcessGroup | None) -> int:
    """Ranks of the group; 1 for None."""
    return 1 if group is None else dist.get_world_size(group)
