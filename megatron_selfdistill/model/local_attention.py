# Copyright (c) 2026 the megatron_selfdistill authors. Apache-2.0.
"""The core attention of packed sequences without Transformer Engine, in segments and in blocks of queries.

It supports grouped queries, sliding windows, sinks, context parallelism and a KV cache.  `PackedSequences` has
everything that layers would otherwise read back from the device.
"""

from __future__ import annotations

import functools
from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Any

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor
from torch.nn.attention import SDPBackend
from torch.utils.checkpoint import checkpoint

from megatron_selfdistill.compat import repairs  # noqa: F401  isort: skip  (must come before megatron.core)
from megatron.core.packed_seq_params import PackedSeqParams
from megatron.core.transformer.module import MegatronModule
from megatron.core.transformer.transformer_config import TransformerConfig
from megatron.core.transformer.utils import ensure_metadata_has_dp_cp_group, make_sharded_tensors_for_checkpoint

from megatron_selfdistill.data.packed_batch import Microbatch
from megatron_selfdistill.data.packing import context_parallel_positions
from megatron_selfdistill.model.attention_variants import (
    SINK,
    attend_with_sinks,
    block_mask,
    left_of_layer,
    seen,
    sinks_of_layer,
    window_blocks,
    within_window,
)
from megatron_selfdistill.model.rotary import know_positions

_FUSED_QUERIES = 1024
"""The number of queries in a block under context parallelism where a fused kernel takes the mask of the block."""


_SCORES = 2**26
"""The number of scores in a block over all heads without such a kernel: 256 MiB in float32."""


class CoreAttention(MegatronModule):
    """The attention ``softmax(scale * q k^T + mask) v`` with a causal mask, for Megatron's ``core_attention``.

    Query position i attends to key position j iff j <= i and both are in the same sequence; in a layer with a sliding
    window (``window_size=(left, 0)`` and ``window_attn_skip_freq``) also iff j >= i - left.  Packed sequences thus give
    the same result as each sequence alone, also when context parallelism cuts them.  With ``softmax_type=learnable``
    each head has a sink, the parameter ``softmax_offset`` [n / tp], which `attention_variants` describes.

    Shapes: query ``[s, b, n, d]`` and key, value ``[s, b, n_kv, d]``, or packed (``qkv_format="thd"``)
    ``[t, n, d]``; result ``[s, b, n * d_v]`` or ``[t, n * d_v]``.  With a KV cache the keys are the whole prefix, and
    the queries are its last positions.  Collectives under context parallelism: one all-gather of K and V in the forward
    pass, one all-reduce of their gradients in the backward pass.
    """

    reads_segment_batches = True
    """Whether packed sequences are computed in the batches of `PackedSequences.segment_batches`."""

    def __init__(
        self,
        config: TransformerConfig,
        layer_number: int,
        attn_mask_type: Any,
        attention_type: str,
        attention_dropout: float | None = None,
        softmax_scale: float | None = None,
        k_channels: int | None = None,
        v_channels: int | None = None,
        cp_comm_type: str | None = None,
        pg_collection: Any = None,
    ) -> None:
        super().__init__(config=config)
        if attention_type != "self":
            raise ValueError(f"CoreAttention computes causal self-attention, got attention_type={attention_type!r}")
        self.softmax_scale = softmax_scale or (k_channels or config.kv_channels) ** -0.5
        self.attention_dropout = config.attention_dropout if attention_dropout is None else attention_dropout
        self.cp_group = pg_collection.cp
        self.left = left_of_layer(config, layer_number)
        self._tp_group = getattr(pg_collection, "tp", None)
        sinks = sinks_of_layer(config, 1 if self._tp_group is None else self._tp_group.size())
        if isinstance(sinks, torch.nn.Parameter):
            self.softmax_offset = sinks
        else:
            self.register_buffer(SINK, sinks, persistent=False)

    def sharded_state_dict(
        self,
        prefix: str = "",
        sharded_offsets: tuple[tuple[int, int, int], ...] = (),
        metadata: dict[str, Any] | None = None,
    ) -> Any:
        """Return the sinks of this rank, cut along the heads, for a checkpoint; nothing where there are no sinks."""
        metadata = ensure_metadata_has_dp_cp_group(metadata)
        return make_sharded_tensors_for_checkpoint(
            self.state_dict(prefix="", keep_vars=True),
            prefix,
            {SINK: 0},
            sharded_offsets,
            tp_group=self._tp_group,
            dp_cp_group=metadata["dp_cp_group"],
        )

    def forward(
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        attention_mask: Tensor | None = None,
        attn_mask_type: Any = None,
        attention_bias: Tensor | None = None,
        packed_seq_params: PackedSeqParams | None = None,
    ) -> Tensor:
        """Return the attention; ``packed_seq_params`` is needed under context parallelism.

        Raises: ValueError for an attention bias, and for context parallelism without packed sequences.
        """
        if attention_bias is not None:
            raise ValueError("CoreAttention has no attention bias; use Transformer Engine's layer spec")
        if packed_seq_params is not None:
            return self._packed(query, key, value, packed_seq_params)
        if self.cp_group.size() > 1:
            raise ValueError("context parallelism needs packed sequences (packed_seq_params with qkv_format='thd')")
        q, k, v = (x.permute(1, 2, 0, 3) for x in (query, key, value))
        if attention_mask is not None:
            allowed = ~attention_mask  # Megatron: True is masked
            out = self._attend(q, k, v, allowed if self.left is None else within_window(allowed, self.left))
        elif q.size(2) == k.size(2):
            out = self._causal(q, k, v)
        elif q.size(2) == 1:  # one decoding step attends to the whole cache, or to its end
            first = 0 if self.left is None else max(k.size(2) - self.left - 1, 0)
            out = self._attend(q, k[:, :, first:], v[:, :, first:])
        else:
            own = torch.arange(k.size(2) - q.size(2), k.size(2), device=q.device)[:, None]
            out = self._attend(q, k, v, allowed=seen(torch.arange(k.size(2), device=q.device), own, self.left))
        return out.permute(2, 0, 1, 3).flatten(2)

    def _causal(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        """Return the attention of whole sequences, [b, n, s, d] each: with a window, one block of queries at a time."""
        if self.left is None or q.size(2) <= self.left + 1:
            return self._attend(q, k, v, causal=True)
        k, v = (_repeated(x, q.size(1)) for x in (k, v))
        out = [
            self._attend(q[:, :, queries], k[:, :, keys], v[:, :, keys], block_mask(queries, keys, self.left, q.device))
            for queries, keys in window_blocks(q.size(2), self.left)
        ]
        return torch.cat(out, dim=2)

    def _packed(self, query: Tensor, key: Tensor, value: Tensor, packed: PackedSeqParams) -> Tensor:
        layout = _attention_layout(packed, self.cp_group, query.device, self.left)
        if isinstance(layout, ContextParallelQueries):
            return self._context_parallel(query, key, value, layout)
        out = []
        for index in layout.batches:
            q, k, v = (x[index].transpose(1, 2) for x in (query, key, value))
            out.append(self._causal(q, k, v).transpose(1, 2).flatten(0, 1).flatten(1))
        return torch.cat(out)[layout.place]  # no real token attends to the repeats behind the end of a segment

    def _context_parallel(self, query: Tensor, key: Tensor, value: Tensor, layout: ContextParallelQueries) -> Tensor:
        """Return the attention of this rank's queries, one block of queries at a time.

        The scores of all queries would be n * (t / cp) * t numbers.  The backward pass computes each block again, so
        that the mask and the scores of only one block exist at a time.
        """
        q = query.transpose(0, 1).unsqueeze(0)  # [1, n, t / cp, d]
        gathered = (GatherSequence.apply(x, self.cp_group) for x in (key, value))  # type: ignore[no-untyped-call]
        k, v = (x[layout.order].transpose(0, 1)[None] for x in gathered)
        recomputed = functools.partial(checkpoint, use_reentrant=False, preserve_rng_state=self.attention_dropout > 0)

        def attend(q: Tensor, k: Tensor, v: Tensor, queries: slice, keys: slice) -> Tensor:
            k, v = (_repeated(x, q.size(1)) for x in (k, v))
            return self._attend(q, k, v, allowed=layout.allowed(queries, keys))

        out = [
            recomputed(attend, q[:, :, queries], k[:, :, keys], v[:, :, keys], queries, keys)
            for queries, keys in layout.blocks(queries_per_block(q, k, v))
        ]
        return torch.cat(out, dim=2).squeeze(0).transpose(0, 1).flatten(1)

    def _attend(self, q: Tensor, k: Tensor, v: Tensor, allowed: Tensor | None = None, causal: bool = False) -> Tensor:
        dropout, scale = self.attention_dropout if self.training else 0.0, self.softmax_scale
        if self.softmax_offset is not None:
            return attend_with_sinks(
                q, k, v, self.softmax_offset, allowed=allowed, causal=causal, scale=scale, dropout=dropout
            )
        return F.scaled_dot_product_attention(
            q,
            k,
            v,
            attn_mask=allowed,
            is_causal=causal,
            dropout_p=dropout,
            scale=scale,
            enable_gqa=q.size(1) != k.size(1),
        )


def _repeated(x: Tensor, num_heads: int) -> Tensor:
    """Return keys or values with one copy per query head: PyTorch's kernels support masks or groups, but not both."""
    return x.repeat_interleave(num_heads // x.size(1), dim=1)


@dataclass(frozen=True)
class SegmentBatches:
    """The segments of a packed sequence in batches of similar lengths; each batch is one causal attention."""

    batches: tuple[Tensor, ...]
    """The token positions of each batch, [segments, length] int64; a short segment repeats its last position."""
    place: Tensor
    """The place of each token of the packed sequence in the concatenation of all batches, [s] int64."""

    def to(self, device: torch.device) -> SegmentBatches:
        """Return these batches on ``device``; wait for the device once per tensor."""
        return SegmentBatches(tuple(index.to(device) for index in self.batches), self.place.to(device))


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

    def within(self, left: int) -> ContextParallelQueries:
        """Return these queries with the keys of a sliding window only: each query and the ``left`` keys before it."""
        bounds = tuple((max(start, position - left), position) for start, position in self.bounds)
        return replace(self, starts=torch.maximum(self.starts, self.positions - left), bounds=bounds)

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


def _attention_layout(
    packed: PackedSeqParams, cp_group: dist.ProcessGroup, device: torch.device, left: int | None
) -> SegmentBatches | ContextParallelQueries:
    """Return the layout of one microbatch for layers with a window ``left``, and keep it on ``packed`` for them."""
    if cp_group.size() == 1:
        return segment_batches_of(packed, device)
    layouts: dict[int | None, ContextParallelQueries] = packed.__dict__.setdefault("_selfdistill_layouts", {})
    if None not in layouts:
        layouts[None] = context_parallel_queries(_host_bounds(packed), cp_group, device)
    if left is not None and left not in layouts:
        layouts[left] = layouts[None].within(left)
    return layouts[left]


def segment_batches_of(packed: PackedSeqParams, device: torch.device) -> SegmentBatches:
    """Return the segments of one microbatch in batches on ``device``.

    If ``packed`` comes without them, they are made once and kept on ``packed``; that waits for the device.
    """
    known: SegmentBatches | None = getattr(packed, "segment_batches", None)
    if known is None:
        known = packed.segment_batches = segments_by_length(_host_bounds(packed)).to(device)
    return known


def _host_bounds(packed: PackedSeqParams) -> Tensor:
    """Return ``cu_seqlens`` [num_segments + 1] int64 on the host; wait for the device if ``packed`` lacks bounds."""
    bounds = getattr(packed, "segment_bounds", ())
    return torch.tensor(bounds, dtype=torch.int64) if bounds else packed.cu_seqlens_q.long().cpu()


def segments_by_length(cu_seqlens: Tensor) -> SegmentBatches:
    """Return the batches for ``cu_seqlens [num_segments + 1]`` int64, all tensors on the host.

    Segments whose lengths round up to the same power of two form one causal batch.  The work is at most 4 times the
    minimum, with log2(s) kernel calls; a dense mask would cost s^2 for any number of segments.
    """
    lengths = cu_seqlens.diff()
    batches, place, offset = [], torch.empty(int(cu_seqlens[-1]), dtype=torch.long), 0
    size_class = torch.ceil(torch.log2(lengths.clamp(min=1).double())).long()
    for cls in torch.unique(size_class).tolist():
        members = ((size_class == cls) & (lengths > 0)).nonzero().flatten()
        if members.numel() == 0:
            continue
        start, length = cu_seqlens[members, None], lengths[members, None]
        within = torch.arange(int(length.max()))[None, :]
        index = start + torch.minimum(within, length - 1)
        own = within < length
        place[index[own]] = offset + torch.arange(index.numel()).view_as(index)[own]
        batches.append(index)
        offset += index.numel()
    return SegmentBatches(batches=tuple(batches), place=place)


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


@dataclass
class PackedSequences(PackedSeqParams):
    """Megatron's parameters of a packed sequence, with the values that layers would otherwise read from the device."""

    segment_bounds: tuple[int, ...] = ()
    """The values of ``cu_seqlens_q`` as Python integers."""
    rotary_positions: Tensor | None = None
    """The position in its sequence of each token that this context-parallel rank holds, [s / cp] int64."""
    segment_batches: SegmentBatches | None = None
    """The batches of segments for layers that compute with PyTorch; None under context parallelism or other layers."""

    def with_positions(self) -> PackedSequences:
        """Return these parameters, after the rotary embedding has learnt the positions (`know_positions`)."""
        know_positions(self.cu_seqlens_q_padded, self.rotary_positions)
        return self

    @functools.cached_property
    def lengths_for_fla(self) -> dict[str, Tensor]:
        """The arguments that state the segments to flash-linear-attention: int64 on the device, and on the host.

        All layers get the same two objects: the library knows its tables of segments by the identity of both.
        """
        return {
            "cu_seqlens": self.cu_seqlens_q.long(),
            "cu_seqlens_cpu": torch.tensor(self.segment_bounds, dtype=torch.int64),
        }

    @classmethod
    def of(cls, microbatch: Microbatch, position_ids: Tensor, *, with_segment_batches: bool) -> PackedSequences:
        """Return the parameters of ``microbatch``, all tensors on the host.

        ``position_ids [s / cp]``: the positions of the tokens that this context-parallel rank holds.
        """
        cu_seqlens, longest = microbatch.cu_seqlens, microbatch.max_seqlen
        return cls(
            qkv_format="thd",
            cu_seqlens_q=cu_seqlens,
            cu_seqlens_kv=cu_seqlens,
            cu_seqlens_q_padded=cu_seqlens,  # causal attention ignores the padding behind a sequence
            cu_seqlens_kv_padded=cu_seqlens,
            max_seqlen_q=longest,
            max_seqlen_kv=longest,
            segment_bounds=tuple(cu_seqlens.tolist()),
            rotary_positions=position_ids,
            segment_batches=segments_by_length(cu_seqlens.long()) if with_segment_batches else None,
        )
