# Copyright (c) 2026 the megatron_selfdistill authors. Apache-2.0.
"""The exchange of tokens' hidden states over a tensor-parallel group: gathered for a GEMM, their gradients summed."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch.distributed as dist
from torch import Tensor


@dataclass(frozen=True)
class HiddenPlacement:
    """The placement of the student's hidden states on the ranks.

    group: the tensor-parallel group; None for one rank.
    gather_indices: None where each rank holds the hidden states of all R tokens.  Else [R] int64, distinct: each rank
    holds a tensor [n, h] of its own, n equal on all ranks, and the hidden state of token i is row gather_indices[i] of
    the tensors of all ranks in rank order.
    """

    group: dist.ProcessGroup | None
    gather_indices: Tensor | None

    @property
    def size(self) -> int:
        """The number of ranks of the group."""
        return group_size(self.group)

    def start_gather(self, held: Tensor) -> Callable[[], Tensor]:
        """Start to gather the hidden states [R, h] of all tokens, and return a function that waits for the result.

        held: the tensor that this rank holds.
        Collectives: one all-gather with gather_indices, which runs while the caller does other work.
        """
        order = self.gather_indices
        if order is None:
            return lambda: held
        if self.size == 1 or len(held) == 0:
            return lambda: held.index_select(0, order)
        all_ranks = held.new_empty(self.size * held.shape[0], held.shape[1])
        handle = all_gather(all_ranks, held.contiguous(), self.group, async_op=True)

        def wait() -> Tensor:
            handle.wait()
            return all_ranks.index_select(0, order)

        return wait

    def start_reduce(self, gradient: Tensor, held: Tensor) -> Callable[[], Tensor]:
        """Start to sum a gradient over the ranks, and return a function that waits for the result.

        gradient: [R, h], this rank's share of the gradient of all tokens' hidden states.
        held: the tensor whose gradient is wanted; the result has its shape, and rows that belong to no token get 0.
        Collectives: one reduce-scatter with gather_indices, else one all-reduce, while the caller does other work.
        """
        out = gradient
        if self.gather_indices is not None:
            all_ranks = gradient.new_zeros(self.size * held.shape[0], held.shape[1])
            gradient = all_ranks.index_copy_(0, self.gather_indices, gradient)
            out = gradient if self.size == 1 else gradient.new_empty(held.shape)
        if self.size == 1 or len(held) == 0:
            return lambda: out
        if self.gather_indices is not None:
            handle = reduce_scatter(out, gradient, self.group)
        else:
            handle = dist.all_reduce(out, group=self.group, async_op=True)

        def wait(summand: Tensor = gradient) -> Tensor:  # keeps the memory that is being read
            handle.wait()
            return out

        return wait


def gather_width(part: Tensor, group: dist.ProcessGroup | None) -> Tensor:
    """Gather [R, h] from slices [R, h / tp] of the width, which the ranks hold in their order.

    Collectives: one all-gather; none for one rank or R = 0.
    """
    size = group_size(group)
    if size == 1 or len(part) == 0:
        return part.repeat(1, size)
    slices = part.new_empty(size * part.shape[0], part.shape[1])
    all_gather(slices, part.contiguous(), group)
    return slices.view(size, *part.shape).transpose(0, 1).flatten(1)


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
