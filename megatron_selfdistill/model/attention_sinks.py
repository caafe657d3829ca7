# Copyright (c) 2026 the megatron_selfdistill authors. Apache-2.0.
"""Attention sinks: one learned score per head that takes a share of the softmax and gives no value.

    softmax([scores, sink])[..., :-1] @ v

A sink is a further key whose score is the sink for every query and whose value is 0.  Further channels hold this score,
so that any kernel of attention computes the sink and its gradient exactly.

Source: Miller 2023, "Attention is off by one"; OpenAI 2025, gpt-oss model card (arXiv 2508.10925).
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

SINK = "softmax_offset"
"""Megatron's name of the parameter [heads of this tensor-parallel rank]."""

_CHANNELS = 8  # two are used; kernels want a multiple of 8


def has_sinks(config: Any) -> bool:
    """Return whether the softmax of attention has a sink; ``config`` is a ``TransformerConfig``."""
    return bool(_kind_of_softmax(config) != "vanilla")


def _kind_of_softmax(config: Any) -> Any:
    return getattr(config.softmax_type, "value", config.softmax_type)


def sinks_of_layer(config: Any, tp_size: int) -> Tensor | None:
    """Return the sinks of the heads that a tensor-parallel rank holds, [n / tp] in ``params_dtype``, all 0 at first.

    `repairs.mark_weights_for_the_norm` marks them as cut, so that the norm of the gradient counts all heads.  They
    are a parameter for ``softmax_type=learnable``, constant for ``off-by-one``, and None for ``vanilla``.

    Raises: ValueError for another ``softmax_type``.
    """
    kind = _kind_of_softmax(config)
    if not has_sinks(config):
        return None
    if kind not in ("learnable", "off-by-one"):
        raise ValueError(f"softmax_type must be vanilla, off-by-one or learnable, got {kind!r}")
    zeros = torch.zeros(config.num_attention_heads // tp_size, dtype=config.params_dtype)
    if kind == "off-by-one":
        return zeros
    return torch.nn.Parameter(zeros)


def attend_with_sinks(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    sinks: Tensor,
    *,
    allowed: Tensor | None,
    causal: bool,
    scale: float,
    dropout: float,
) -> Tensor:
    """Return ``softmax([scale * q k^T + mask, sink])[..., :-1] @ v``, [b, n, s, d_v], in the dtype of ``query``.

    Shapes: ``query [b, n, s, d]``, ``key [b, n_kv, t, d]``, ``value [b, n_kv, t, d_v]`` with d_v <= d, ``sinks [n]``,
    ``allowed`` bool, broadcast to [b, n, s, t]: True where a query sees a key.  ``causal``: query i sees key j <= i,
    where s equals t.
    """
    channels, width = query.size(-1), value.size(-1)
    query = torch.cat([query, sink_channels(sinks, scale, query)], dim=-1)
    if causal:  # a further first query, which sees only the sink, keeps the mask of the others triangular
        query = F.pad(query, (0, 0, 1, 0))
    sink_key = torch.zeros_like(key[:, :, :1])
    sink_key = F.pad(F.pad(sink_key, (0, 2), value=1.0), (0, _CHANNELS - 2))
    key = torch.cat([sink_key, F.pad(key, (0, _CHANNELS))], dim=2)
    value = F.pad(value, (0, channels + _CHANNELS - width, 1, 0))
    out = F.scaled_dot_product_attention(
        query,
        key,
        value,
        attn_mask=None if allowed is None else F.pad(allowed, (1, 0), value=True),
        is_causal=causal,
        dropout_p=dropout,
        scale=scale,
        enable_gqa=query.size(1) != key.size(1),
    )
    return out[:, :, int(causal) :, :width]


def sink_channels(sinks: Tensor, scale: float, query: Tensor) -> Tensor:
    """Return the channels [b, n, s, 8] whose product with the sink's key, times ``scale``, is the sink.

    Two channels together have the precision of float32 where the dtype of ``query`` is bf16.
    """
    exact = sinks.float() / scale
    high = exact.to(query.dtype)
    low = (exact - high.float()).detach().to(query.dtype)
    both = F.pad(torch.stack([high, low], dim=-1), (0, _CHANNELS - 2))
    return both[None, :, None].expand(query.size(0), -1, query.size(2), -1)
