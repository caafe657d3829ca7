# Copyright (c) 2026 the megatron_selfdistill authors. Apache-2.0.
"""Sliding windows and sinks of causal attention.

A query of a layer with a window sees the keys of the window.  ``left`` is Megatron's number: a query attends to itself
and to the ``left`` keys before it.  Hugging Face's ``sliding_window`` counts the query's own key too, so that ``left =
sliding_window - 1``.

A sink is one learned score per head that takes a share of the softmax and gives no value.

    softmax([scores, sink])[..., :-1] @ v

A sink is a further key whose score is the sink for every query and whose value is 0.  Further channels hold this score,
so that any kernel of attention computes the sink and its gradient exactly.

Source: Miller 2023, "Attention is off by one"; OpenAI 2025, gpt-oss model card (arXiv 2508.10925).
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

SINK = "softmax_offset"
"""Megatron's name of the parameter [heads of this tensor-parallel rank]."""

_CHANNELS = 8  # two are used; kernels want a multiple of 8
_LEAST_QUERIES, _MOST_QUERIES = 128, 512
"""The bounds of the number of queries in a block: shorter blocks call more kernels, longer blocks mask more keys."""


def has_sinks(config: Any) -> bool:
    """Return whether the softmax of attention has a sink; ``config`` is a ``TransformerConfig``."""
    return bool(_kind_of_softmax(config) != "vanilla")


def _kind_of_softmax(config: Any) -> Any:
    return getattr(config.softmax_type, "value", config.softmax_type)


def sinks_of_layer(config: Any, tp_size: int) -> Tensor | None:
    """Return the sinks of the heads that a tensor-parallel rank holds, [n / tp] in ``params_dtype``, all 0 at first.

    `repairs.mark_weights_for_the_norm` marks them as cut, so that the norm of the gradient counts all heads.  They
    are a parameter for ``softmax_type=learnable``, constant for ``off-by-one``, and None for ``vanilla``.
    """
    kind = _kind_of_softmax(config)
    if not has_sinks(config):
        return None
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


def windowed_layers(window_attn_skip_freq: int | Sequence[int] | None, num_layers: int) -> list[bool]:
    """Return for each of ``num_layers`` layers whether it has the window, as Megatron Core numbers the layers.

    ``window_attn_skip_freq``: null is a window in every layer; N is full attention in every Nth layer; a list has 1 for
    each layer with a window.  `window_faults` has refused other values.
    Source: ``is_layer_window_attention`` of Megatron Core.
    """
    freq = window_attn_skip_freq
    if freq is None:
        return [True] * num_layers
    if isinstance(freq, int):
        return [layer % freq != 0 for layer in range(1, num_layers + 1)]
    return [bool(windowed) for windowed in freq]


def window_faults(config: Any, *, transformer_engine: bool) -> list[tuple[bool, str]]:
    """Return what neither Megatron Core nor `CoreAttention` computes, and whether ``config`` has it.

    ``config``: a ``TransformerConfig``.  Each entry is (whether it is found, the message about it).
    """
    window, freq = config.window_size, config.window_attn_skip_freq
    bounded = window is not None and len(window) == 2 and window[0] >= 0 and window[1] == 0
    # A layer with sinks has this program's own attention beside Transformer Engine's layers, too.
    cut = transformer_engine and config.context_parallel_size > 1 and not has_sinks(config)
    communication = set(config.cp_comm_type if isinstance(config.cp_comm_type, list) else [config.cp_comm_type])
    return [
        (
            window is not None and not bounded,
            f"model.transformer.window_size={window}: expected [left, 0], where left is the number of tokens before "
            "a token that the token sees, or null for full attention",
        ),
        (
            bounded and isinstance(freq, int) and freq < 1,
            f"model.transformer.window_attn_skip_freq={freq}: expected at least 1, a list with 1 for each layer that "
            "has the window, or null for a window in every layer",
        ),
        (
            bounded and isinstance(freq, list) and len(freq) != config.num_layers,
            f"model.transformer.window_attn_skip_freq={freq}: expected one entry for each of the {config.num_layers} "
            "layers",
        ),
        (
            cut and bounded and not communication <= {"a2a", "all_gather"},
            "Transformer Engine has no sliding window for cp_comm_type=p2p: set model.transformer.cp_comm_type=a2a or "
            "parallel.context_parallel_size=1",
        ),
    ]


def left_of_layer(config: Any, layer_number: int) -> int | None:
    """Return the number of earlier keys that a query of a layer sees; None for full attention.

    ``config``: a ``TransformerConfig``; ``layer_number`` begins with 1 and counts the layers of all stages.
    """
    if not config.window_size:
        return None
    windowed = windowed_layers(config.window_attn_skip_freq, config.num_layers)
    return int(config.window_size[0]) if windowed[layer_number - 1] else None


def window_blocks(length: int, left: int) -> Iterator[tuple[slice, slice]]:
    """Yield blocks of the queries of a causal sequence of ``length`` tokens, each with the range of keys that it sees.

    The work and the masks of all blocks are ``length * (left + block)`` scores, not ``length ** 2``.
    """
    size = min(max(left + 1, _LEAST_QUERIES), _MOST_QUERIES)
    for first in range(0, length, size):
        last = min(first + size, length)
        yield slice(first, last), slice(max(first - left, 0), last)


def block_mask(queries: slice, keys: slice, left: int, device: torch.device) -> Tensor:
    """Return the mask [queries, keys] bool of a block of `window_blocks`: True where a query sees a key."""
    own = torch.arange(queries.start, queries.stop, device=device)[:, None]
    return seen(torch.arange(keys.start, keys.stop, device=device), own, left)


def seen(keys: Tensor, own: Tensor, left: int | None) -> Tensor:
    """Return whether a query at position ``own`` sees the key at each position of ``keys``; both broadcast, int64."""
    mask = keys <= own
    return mask if left is None else mask & (keys >= own - left)


def within_window(allowed: Tensor, left: int) -> Tensor:
    """Return the mask ``allowed [..., queries, keys]`` bool without the keys that lie before the window of each query.

    The own key of a query is the last key that ``allowed`` grants it, as in causal masks and in a cache whose rows
    have unequal lengths.
    """
    keys = torch.arange(allowed.size(-1), device=allowed.device)
    own = torch.where(allowed, keys, -1).amax(-1, keepdim=True)
    return allowed & (keys >= own - left)
