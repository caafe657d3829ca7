# Copyright (c) 2026 the megatron_selfdistill authors. Apache-2.0.
"""The attention of packed sequences that context parallelism cuts: all keys, and one block of queries at a time."""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.nn.attention import SDPBackend
from torch.utils.checkpoint import checkpoint

from megatron_selfdistill.data.context_parallel import context_parallel_positions

_FUSED_QUERIES = 1024
"""The number of queries in a block under context parallelism where a fused kernel takes the mask of the block."""
_SCORES = 2**26
"""The number of scores in a block over all heads without such a kernel: 256 MiB in float32."""


def context_parallel_attention(
    attend: Callable[[Tensor, Tensor, Tensor, Tensor], Tensor],
    states: tuple[Tensor, Tensor, Tensor],
    layout: ContextParallelQueries,
    group: dist.ProcessGroup,
    *,
    draws: bool,
) -> Tensor:
    """Return the attention [t / cp, n * d_v] of this rank's queries, one block of queries at a time.

    ``attend``: the attention of queries, keys and values [1, n, .., d] under a mask [queries, keys].  ``states``: this
    rank's queries [t / cp, n, d], keys and values [t / cp, n_kv, d].  ``draws``: whether ``attend`` draws random
    numbers.
    The scores of all queries would be n * (t / cp) * t numbers.  The backward pass computes each block again, so
    that the mask and the scores of only one block exist at a time.
    Collectives: one all-gather of K and V in the forward pass, one all-reduce of their gradients in the backward pass.
    """
    query, key, value = states
    q = query.transpose(0, 1).unsqueeze(0)  # [1, n, t / cp, d]
    gathered = (GatherSequence.apply(x, group) for x in (key, value))  # type: ignore[no-untyped-call]
    k, v = (x[layout.order].transpose(0, 1)[None] for x in gathered)
    recomputed = functools.partial(checkpoint, use_reentrant=False, preserve_rng_state=draws)

    def block(q: Tensor, k: Tensor, v: Tensor, queries: slice, keys: slice) -> Tensor:
        k, v = (repeated(x, q.size(1)) for x in (k, v))
        return attend(q, k, v, layout.allowed(queries, keys))

    out = [
        recomputed(block, q[:, :, queries], k[:, :, keys], v[:, :, keys], queries, keys)
        for queries, keys in layout.blocks(queries_per_block(q, k, v))
    ]
    return torch.cat(out, dim=2).squeeze(0).transpose(0, 1).flatten(1)


def repeated(x: Tensor, num_heads: int) -> Tensor:
    """Return keys or values with one copy per query head: PyTorch's kernels support masks or groups, but not both."""
    return x.repeat_interleave(num_heads // x.size(1), dim=1)


@dataclass(frozen=True)
class ContextParallelQueries:
    """The positions of a packed sequence that a context-parallel rank holds as queries, and the keys of each query."""

    order: Tensor
    """The indices of the gathered keys in the order of the sequence, [t] int64, on the device."""
    positions: Tensor
    """The position of each query in the sequence, [t / cp] int64, on the device."""
    starts: Tensor
    """The position at which the segment of each query begins, [t / cp] int64, on the device."""
    bounds: tuple[tuple[int, int], ...]
    """The (start, position) of each query as Python integers."""

    def blocks(self, num_queries: int) -> Iterator[tuple[slice, slice]]:
        """Yield blocks of at most ``num_queries`` queries, each with the range of keys to which its queries attend."""
        for first in range(0, len(self.bounds), num_queries):
            block = self.bounds[first : first + num_queries]
            keys = slice(min(start for start, _ in block), max(position for _, position in block) + 1)
            yield slice(first, first + len(block)), keys

    def allowed(self, queries: slice, keys: slice) -> Tensor:
        """Return the mask [queries, keys] of a block: True for keys in the query's segment, up to the query."""
        numbers = torch.arange(keys.start, keys.stop, device=self.order.device)
        return (numbers >= self.starts[queries, None]) & (numbers <= self.positions[queries, None])


def queries_per_block(q: Tensor, k: Tensor, v: Tensor) -> int:
    """Return the number of queries in a block, which bounds the largest temporary tensor.

    Shapes: ``q [1, n, t / cp, d]``, ``k, v [1, n_kv, t, d]``.  The temporary of a fused kernel is the mask; without a
    kernel that supports masks, the temporary is the scores of all heads.
    """
    num_queries, num_keys = min(q.size(2), _FUSED_QUERIES), k.size(2)
    mask = torch.empty(1, 1, num_queries, num_keys, dtype=torch.bool, device=q.device)
    k, v = (x[:, :1].expand(-1, q.size(1), -1, -1) for x in (k, v))
    if torch._fused_sdp_choice(q[:, :, :num_queries], k, v, mask, 0.0, False) != SDPBackend.MATH.value:
        return _FUSED_QUERIES
    return max(1, _SCORES // (q.size(1) * num_keys))


def context_parallel_queries(
    cu_seqlens: Tensor, cp_group: dist.ProcessGroup, device: torch.device
) -> ContextParallelQueries:
    """Return the positions of this rank of ``cp_group``; ``cu_seqlens [num_segments + 1]`` is int64 on the host."""
    held = [context_parallel_positions(cu_seqlens, cp_group.size(), rank) for rank in range(cp_group.size())]
    positions = held[cp_group.rank()]
    starts = cu_seqlens[torch.bucketize(positions, cu_seqlens[1:].contiguous(), right=True)]
    return ContextParallelQueries(
        order=torch.argsort(torch.cat(held)).to(device),
        positions=positions.to(device),
        starts=starts.to(device),
        bounds=tuple(zip(starts.tolist(), positions.tolist(), strict=True)),
    )


class GatherSequence(torch.autograd.Function):
    """An all-gather of tokens over the context-parallel group; backward all-reduces, and keeps this rank's tokens."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, group: dist.ProcessGroup) -> Tensor:
        """Return the tokens of all ranks, concatenated."""
        ctx.group = group
        parts = [torch.empty_like(x) for _ in range(group.size())]
        dist.all_gather(parts, x.contiguous(), group=group)
        return torch.cat(parts)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        """Return the summed gradient of this rank's tokens."""
        # gloo lacks reduce_scatter for some dtypes.
        grad = grad.contiguous()
        dist.all_reduce(grad, group=ctx.group)
        return grad.chunk(ctx.group.size())[ctx.group.rank()].contiguous(), None
