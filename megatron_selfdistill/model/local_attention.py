# Copyright (c) 2026 the megatron_selfdistill authors. Apache-2.0.
"""The core attention of packed sequences without Transformer Engine, in batches of segments of similar lengths.

It supports grouped queries, context parallelism and a KV cache.  `PackedSequences` has everything that layers would
otherwise read back from the device.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from megatron_selfdistill.compat import repairs  # noqa: F401  isort: skip  (must come before megatron.core)
from megatron.core.packed_seq_params import PackedSeqParams
from megatron.core.transformer.module import MegatronModule
from megatron.core.transformer.transformer_config import TransformerConfig

from megatron_selfdistill.data.packed_batch import Microbatch
from megatron_selfdistill.model.context_parallel_attention import (
    ContextParallelQueries,
    context_parallel_attention,
    context_parallel_queries,
)
from megatron_selfdistill.model.rotary import know_positions


class CoreAttention(MegatronModule):
    """The attention ``softmax(scale * q k^T + mask) v`` with a causal mask, for Megatron's ``core_attention``.

    Query position i attends to key position j iff j <= i and both are in the same sequence.  Packed sequences thus give
    the same result as each sequence alone, also when context parallelism cuts them.

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
            out = self._attend(q, k, v, allowed=~attention_mask)  # Megatron: True is masked
        elif q.size(2) == k.size(2):
            out = self._attend(q, k, v, causal=True)
        elif q.size(2) == 1:  # one decoding step attends to the whole cache
            out = self._attend(q, k, v)
        else:
            positions = torch.arange(k.size(2), device=q.device)
            out = self._attend(q, k, v, allowed=positions <= positions[-q.size(2) :, None])
        return out.permute(2, 0, 1, 3).flatten(2)

    def _packed(self, query: Tensor, key: Tensor, value: Tensor, packed: PackedSeqParams) -> Tensor:
        if self.cp_group.size() > 1:
            layout, draws = self._held_queries(packed, query.device), self.attention_dropout > 0
            return context_parallel_attention(self._attend, (query, key, value), layout, self.cp_group, draws=draws)
        segments = segment_batches_of(packed, query.device)
        out = []
        for index in segments.batches:
            q, k, v = (x[index].transpose(1, 2) for x in (query, key, value))
            out.append(self._attend(q, k, v, causal=True).transpose(1, 2).flatten(0, 1).flatten(1))
        return torch.cat(out)[segments.place]  # no real token attends to the repeats behind the end of a segment

    def _held_queries(self, packed: PackedSeqParams, device: torch.device) -> ContextParallelQueries:
        """Return the queries of this context-parallel rank, and keep them on ``packed`` for the other layers."""
        kept: ContextParallelQueries | None = packed.__dict__.get("_held_queries")
        if kept is None:
            kept = context_parallel_queries(_host_bounds(packed), self.cp_group, device)
            packed.__dict__["_held_queries"] = kept
        return kept

    def _attend(self, q: Tensor, k: Tensor, v: Tensor, allowed: Tensor | None = None, causal: bool = False) -> Tensor:
        """Return the attention [b, n, s, d_v] of ``q`` [b, n, s, d], ``k`` and ``v`` [b, n_kv, t, d].

        ``allowed``: bool, broadcast to [b, n, s, t], True where a query sees a key.  ``causal``: query i sees key
        j <= i.  Without both, every query sees all keys.
        """
        return F.scaled_dot_product_attention(
            q,
            k,
            v,
            attn_mask=allowed,
            is_causal=causal,
            dropout_p=self.attention_dropout if self.training else 0.0,
            scale=self.softmax_scale,
            enable_gqa=q.size(1) != k.size(1),
        )


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


@dataclass
class PackedSequences(PackedSeqParams):
    """Megatron's parameters of a packed sequence, with the values that layers would otherwise read from the device."""

    segment_bounds: tuple[int, ...] = ()
    """The values of ``cu_seqlens_q`` as Python integers."""
    rotary_positions: Tensor | None = None
    """The position in its sequence of each token that this context-parallel rank holds, [s / cp] int64."""
    segment_batches: SegmentBatches | None = None
    """The batches of segments for layers that compute with PyTorch; None under context parallelism or other layers."""
    pad_between_seqs: bool = False
    """Whether padding stands between sequences; with None, Transformer Engine compares lengths on the device."""

    def with_positions(self) -> PackedSequences:
        """Return these parameters, after the rotary embedding has learnt the positions (`know_positions`)."""
        know_positions(self.cu_seqlens_q_padded, self.rotary_positions)
        return self

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
