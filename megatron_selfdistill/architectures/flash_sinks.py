# Copyright (c) 2026 the megatron_selfdistill authors. Apache-2.0.
"""Attention sinks in packed sequences on a GPU: PyTorch's flash attention, corrected by its log-sum-exp.

Transformer Engine before 2.12 has no kernel for sinks (``softmax_type``) in packed sequences.  Flash attention has no
sinks, but returns the log-sum-exp of the scores s of each query, from which the softmax with the sink follows exactly:

    l_i = log sum_j exp(s_ij)                 o_i = sum_j exp(s_ij - l_i) v_j         (flash attention)
    z_i = log(exp(l_i) + exp(sink))           y_i = exp(l_i - z_i) o_i                (with the sink)

So windows, grouped queries and packed sequences cost what they cost in flash attention.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from megatron_selfdistill.compat import repairs  # noqa: F401  isort: skip  (must come before megatron.core)
from megatron.core.packed_seq_params import PackedSeqParams
from megatron.core.transformer.transformer_config import TransformerConfig

from megatron_selfdistill.architectures.attention_variants import VariantAttention
from megatron_selfdistill.model.context_parallel_attention import GatherSequence
from megatron_selfdistill.model.known_faults import has_sinks

_NO_DROPOUT, _CAUSAL = 0.0, True


class FlashSinkAttention(VariantAttention):
    """`VariantAttention` with sinks beside Transformer Engine's layers: flash attention computes packed sequences.

    Packed queries, keys and values are bf16 or fp16; dropout is not supported.  Collectives under context parallelism:
    those of `CoreAttention`.
    """

    reads_segment_batches = False

    def _packed(self, query: Tensor, key: Tensor, value: Tensor, packed: PackedSeqParams) -> Tensor:
        assert self.softmax_offset is not None
        cp_size = self.cp_group.size()
        if cp_size > 1:
            packed, places = _keys_of_rank(packed, query.size(0), cp_size, self.cp_group.rank())
            key, value = (
                GatherSequence.apply(x, self.cp_group).index_select(0, places)  # type: ignore[no-untyped-call]
                for x in (key, value)
            )
        left = -1 if self.left is None else self.left
        arguments = (query, key, value, self.softmax_offset, packed, left, self.softmax_scale)
        out: Tensor = _FlashWithSinks.apply(*arguments)  # type: ignore[no-untyped-call]
        return out.flatten(1)


class _FlashWithSinks(torch.autograd.Function):
    """The attention y of this module, with its exact gradients by flash attention's backward pass.

    With P_ij = exp(s_ij - z_i), the softmax with the sink is y_i = sum_j P_ij v_j, and the sink itself has the
    probability exp(sink - z_i) and the value 0.  For the gradient dy of a loss, the derivative of a softmax gives

        dv_j  = sum_i P_ij dy_i
        ds_ij = P_ij (dy_i . v_j - dy_i . y_i)
        dsink = - sum_i exp(sink - z_i) (dy_i . y_i)

    Flash attention's backward pass computes dv and ds, and from ds the gradients of queries and keys, as

        dv_j  = sum_i exp(s_ij - l_i) dy_i
        ds_ij = exp(s_ij - l_i) (dy_i . v_j - dy_i . o_i)

    from the output o and the log-sum-exp l that it is handed.  So it is handed y and z instead.
    """

    @staticmethod
    def forward(
        ctx: Any,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        sinks: Tensor,
        packed: PackedSeqParams,
        left: int,
        scale: float,
    ) -> Tensor:
        """Return y [t, n, d] in the dtype of ``query``.

        Shapes: ``query [t, n, d]``, ``key, value [t_kv, n_kv, d]``, ``sinks [n]``.  ``left``: the number of keys before
        its own key that a query sees; -1 for all.  The last query of each sequence sees the last key of its sequence.
        """
        ctx.packed, ctx.scores = packed, {"scale": scale, "window_size_left": left, "window_size_right": 0}
        flash: tuple[Tensor, ...] = torch.ops.aten._flash_attention_forward(
            query, key, value, *_segments(packed), _NO_DROPOUT, _CAUSAL, False, **ctx.scores
        )
        out, lse, *random_state, _ = flash
        sink = sinks.to(lse.dtype)[:, None]  # [n, 1], and lse is [n, t]
        out = (out * torch.sigmoid(lse - sink).t()[..., None]).to(out.dtype)  # exp(l - z), without rounding z
        ctx.save_for_backward(query, key, value, sinks, out, torch.logaddexp(lse, sink), *random_state)
        return out

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        """Return the gradients of queries, keys, values and sinks, each in the dtype of its tensor."""
        query, key, value, sinks, out, lse, *random_state = ctx.saved_tensors
        of_inputs = torch.ops.aten._flash_attention_backward(
            grad, query, key, value, out, lse, *_segments(ctx.packed), _NO_DROPOUT, _CAUSAL, *random_state, **ctx.scores
        )
        of_sinks = None
        if ctx.needs_input_grad[3]:
            products = (grad.to(lse.dtype) * out).sum(-1).t()  # [n, t]
            of_sinks = -((sinks.to(lse.dtype)[:, None] - lse).exp() * products).sum(-1).to(sinks.dtype)
        return *of_inputs, of_sinks, None, None, None


def _segments(packed: PackedSeqParams) -> tuple[Tensor, Tensor, int, int]:
    return packed.cu_seqlens_q, packed.cu_seqlens_kv, packed.max_seqlen_q, packed.max_seqlen_kv


def _keys_of_rank(
    packed: PackedSeqParams, num_queries: int, cp_size: int, cp_rank: int
) -> tuple[PackedSeqParams, Tensor]:
    """Return the segments of a context-parallel rank, and the places of their keys among the gathered keys, int64.

    The rank holds two chunks of each sequence as queries (`context_parallel_positions`).  Each chunk is a
    segment whose keys are those of its sequence up to the end of the chunk.  The tensors are computed on the device,
    for which the host does not wait, and are kept on ``packed`` for all layers.
    """
    if (kept := packed.__dict__.get("_keys_of_rank")) is not None:
        result: tuple[PackedSeqParams, Tensor] = kept
        return result
    bounds, num_chunks = packed.cu_seqlens_q.long(), 2 * cp_size
    starts, chunk = (x.repeat_interleave(2) for x in (bounds[:-1], bounds.diff() // num_chunks))
    is_second = torch.arange(len(chunk), device=bounds.device) % 2
    own = cp_rank + is_second * (num_chunks - 1 - 2 * cp_rank)  # the index of each chunk in its sequence
    num_keys = chunk * (own + 1)
    queries_before, keys_before = (torch.nn.functional.pad(x.cumsum(0), (1, 0)) for x in (chunk, num_keys))
    total = num_queries * (num_chunks + 1) // 2  # over both segments of a sequence: its keys and one chunk more
    segment = torch.arange(len(own), device=own.device).repeat_interleave(num_keys, output_size=total)
    inside = torch.arange(total, device=own.device) - keys_before[segment]  # position in the sequence
    starts, chunk = starts[segment], chunk[segment]
    index = inside // chunk
    in_second = index >= cp_size
    holder = torch.where(in_second, num_chunks - 1 - index, index)
    places = holder * num_queries + starts // cp_size + in_second * chunk + inside % chunk
    of_rank = PackedSeqParams(
        qkv_format="thd",
        cu_seqlens_q=queries_before.int(),
        cu_seqlens_kv=keys_before.int(),
        max_seqlen_q=packed.max_seqlen_q // num_chunks,
        max_seqlen_kv=packed.max_seqlen_q,
    )
    packed.__dict__["_keys_of_rank"] = of_rank, places
    return of_rank, places


def sink_faults(config: TransformerConfig, *, transformer_engine: bool) -> list[tuple[bool, str]]:
    """Return what `FlashSinkAttention` does not compute, and whether ``config`` has it.

    Each entry is (whether it is found, the message about it).  Without Transformer Engine's layers nothing is found.
    """
    used = transformer_engine and has_sinks(config)
    prefix = f"attention sinks (softmax_type={getattr(config.softmax_type, 'value', config.softmax_type)})"
    return [
        (
            used and config.multi_latent_attention,
            f"{prefix} with Transformer Engine's layers have no latent attention: set "
            "model.transformer.softmax_type=vanilla",
        ),
        (
            used and (config.fp8_dot_product_attention or config.fp8_multi_head_attention),
            f"{prefix} with Transformer Engine's layers have no FP8: leave model.transformer.fp8_dot_product_attention "
            "and fp8_multi_head_attention false",
        ),
        (
            used and config.deterministic_mode and not torch.are_deterministic_algorithms_enabled(),
            f"{prefix} with Transformer Engine's layers add gradients in any order, unless PyTorch's deterministic "
            "algorithms are on: do not set model.transformer.deterministic_mode",
        ),
    ]
