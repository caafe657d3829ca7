# Copyright (c) 2026 the megatron_selfdistill authors. Apache-2.0.
"""What Megatron's local layer spec lacks without Transformer Engine: RMSNorm for sequence parallelism, and a
core attention with grouped queries, packed sequences, context parallelism and a KV cache."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
import torch.nn.functional as F
from megatron.core.packed_seq_params import PackedSeqParams
from megatron.core.transformer.module import MegatronModule
from megatron.core.transformer.transformer_config import TransformerConfig
from torch import Tensor

from megatron_selfdistill.data.packing import context_parallel_positions


class RMSNorm(torch.nn.Module):
    """``x * rsqrt(mean(x^2) + eps) * weight``, the mean in float32, the product in the input's dtype (Hugging
    Face's order).

    Shapes: ``[..., hidden_size]`` in and out. Under sequence parallelism each rank normalises its own rows
    and ``finalize_model_grads`` sums the weight's gradient over the tensor-parallel group, because the weight
    says so.
    Source: Zhang and Sennrich 2019 (arXiv 1910.07467); Megatron's ``WrappedTorchNorm`` refuses sequence
    parallelism.
    """

    def __init__(self, config: TransformerConfig, hidden_size: int, eps: float = 1e-5, **_: Any) -> None:
        super().__init__()
        self.eps = eps
        self.zero_centered_gamma = config.layernorm_zero_centered_gamma
        initial = torch.zeros if self.zero_centered_gamma else torch.ones
        self.weight = torch.nn.Parameter(initial(hidden_size, dtype=config.params_dtype))
        self.weight.sequence_parallel = config.sequence_parallel  # type: ignore[attr-defined]

    def forward(self, x: Tensor) -> Tensor:
        normed = x.float()
        normed = normed * torch.rsqrt(normed.pow(2).mean(-1, keepdim=True) + self.eps)
        weight = self.weight + 1 if self.zero_centered_gamma else self.weight
        return normed.to(x.dtype) * weight


class CoreAttention(MegatronModule):
    """``softmax(scale * q k^T + mask) v`` with a causal mask, as Megatron's ``core_attention`` submodule.

    Query position i sees key position j iff j <= i and both lie in the same sequence, so packed sequences
    equal each sequence alone, also when context parallelism cuts them.

    Shapes: query ``[s, b, n, d]`` and key, value ``[s, b, n_kv, d]``, or packed (``qkv_format="thd"``)
    ``[t, n, d]``; result ``[s, b, n * d_v]`` or ``[t, n * d_v]``. With a KV cache the keys are the whole
    prefix and the queries its last rows. Collectives: under context parallelism one all-gather of K and V
    forward, one all-reduce of their gradients backward.
    """

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
        elif q.size(2) == 1:  # one decoding step sees the whole cache
            out = self._attend(q, k, v)
        else:
            last = torch.arange(k.size(2) - q.size(2), k.size(2), device=q.device)
            out = self._attend(q, k, v, allowed=torch.arange(k.size(2), device=q.device) <= last[:, None])
        return out.permute(2, 0, 1, 3).flatten(2)

    def _packed(self, query: Tensor, key: Tensor, value: Tensor, packed: PackedSeqParams) -> Tensor:
        layout = _attention_layout(packed, self.cp_group, query.device)
        if layout.allowed is not None:
            key, value = (_GatherSequence.apply(x, self.cp_group) for x in (key, value))
            q, k, v = (x.transpose(0, 1).unsqueeze(0) for x in (query, key, value))
            return self._attend(q, k, v, allowed=layout.allowed).squeeze(0).transpose(0, 1).flatten(1)
        assert layout.segments is not None
        out = []
        for index in layout.segments.batches:
            q, k, v = (x[index].transpose(1, 2) for x in (query, key, value))
            out.append(self._attend(q, k, v, causal=True).transpose(1, 2).flatten(0, 1).flatten(1))
        return torch.cat(out)[layout.segments.place]  # repeats lie behind their segment's end: nothing real saw them

    def _attend(self, q: Tensor, k: Tensor, v: Tensor, allowed: Tensor | None = None, causal: bool = False) -> Tensor:
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
    """The segments of a packed row in batches of like lengths; one causal attention each."""

    batches: tuple[Tensor, ...]
    """[segments, length] int64 each: rows of the packed row; a short segment repeats its last row."""
    place: Tensor
    """[s] int64: where each row of the packed row lies among the concatenated rows of all batches."""

    def to(self, device: torch.device) -> SegmentBatches:
        """Return the same on ``device``; waits for the device once per tensor."""
        return SegmentBatches(tuple(index.to(device) for index in self.batches), self.place.to(device))


@dataclass(frozen=True)
class _Layout:
    """Which rows attend together: ``allowed [t/cp, t]`` (context parallel), or ``segments``."""

    allowed: Tensor | None = None
    segments: SegmentBatches | None = None


def _attention_layout(packed: PackedSeqParams, cp_group: dist.ProcessGroup, device: torch.device) -> _Layout:
    """The layout of one microbatch, made once and kept on its ``packed_seq_params`` for the other layers."""
    if (segments := getattr(packed, "segment_batches", None)) is not None:
        return _Layout(segments=segments)
    layout = getattr(packed, "_selfdistill_layout", None)
    if layout is None:
        if cp_group.size() == 1:
            layout = _Layout(segments=segments_by_length(_host_bounds(packed)).to(device))
        else:
            layout = _position_and_segment_mask(_host_bounds(packed), cp_group, device)
        packed._selfdistill_layout = layout  # type: ignore[attr-defined]
    return layout


def _host_bounds(packed: PackedSeqParams) -> Tensor:
    """Return ``cu_seqlens`` on the host, [num_segments + 1] int64; waits for the device unless ``packed`` knows it."""
    bounds = getattr(packed, "segment_bounds", ())
    return torch.tensor(bounds, dtype=torch.int64) if bounds else packed.cu_seqlens_q.long().cpu()


def segments_by_length(cu_seqlens: Tensor) -> SegmentBatches:
    """Return the batches for ``cu_seqlens [num_segments + 1]`` int64, all tensors on the host.

    Segments whose lengths share a power of two form one causal batch: at most 4 times the least work and log2(s) kernel
    calls, where a dense mask would cost s^2 for any number of segments.
    """
    lengths = cu_seqlens.diff()
    batches, place, offset = [], torch.empty(int(cu_seqlens[-1]), dtype=torch.long), 0
    size_class = torch.ceil(torch.log2(lengths.clamp(min=1).double())).long()
    for cls in size_class.unique().tolist():
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


def _position_and_segment_mask(cu_seqlens: Tensor, cp_group: dist.ProcessGroup, device: torch.device) -> _Layout:
    cp_size = cp_group.size()
    held = [context_parallel_positions(cu_seqlens, cp_size, rank) for rank in range(cp_size)]
    queries, keys = held[cp_group.rank()], torch.cat(held)
    segment_ends = cu_seqlens[1:].contiguous()
    same = torch.bucketize(queries, segment_ends, right=True)[:, None] == torch.bucketize(
        keys, segment_ends, right=True
    )
    return _Layout(allowed=(same & (keys <= queries[:, None])).to(device))


class _GatherSequence(torch.autograd.Function):
    """All-gather rows over the context-parallel group forward; all-reduce and keep the own rows backward."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, group: dist.ProcessGroup) -> Tensor:  # type: ignore[override]
        ctx.group = group
        parts = [torch.empty_like(x) for _ in range(group.size())]
        dist.all_gather(parts, x.contiguous(), group=group)
        return torch.cat(parts)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:  # type: ignore[override]
        # gloo has no reduce_scatter for every dtype; machines with Transformer Engine never come here.
        grad = grad.contiguous()
        dist.all_reduce(grad, group=ctx.group)
        return grad.chunk(ctx.group.size())[ctx.group.rank()].contiguous(), None
