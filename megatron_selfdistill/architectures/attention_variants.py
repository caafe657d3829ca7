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

from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from megatron_selfdistill.compat import repairs  # noqa: F401  isort: skip  (must come before megatron.core)
from megatron.core.packed_seq_params import PackedSeqParams
from megatron.core.transformer.transformer_config import TransformerConfig
from megatron.core.transformer.utils import (
    ensure_metadata_has_dp_cp_group,
    is_layer_window_attention,
    make_sharded_tensors_for_checkpoint,
)

from megatron_selfdistill.model.context_parallel_attention import ContextParallelQueries, repeated
from megatron_selfdistill.model.known_faults import has_sinks
from megatron_selfdistill.model.local_attention import CoreAttention

SINK = "softmax_offset"
"""Megatron's name of the parameter [heads of this tensor-parallel rank]."""

_CHANNELS = 8  # two are used; kernels want a multiple of 8
_LEAST_QUERIES, _MOST_QUERIES = 128, 512
"""The bounds of the number of queries in a block: shorter blocks call more kernels, longer blocks mask more keys."""


class VariantAttention(CoreAttention):
    """`CoreAttention` of a model whose layers have sliding windows or sinks; a layer may have neither.

    A query of a layer with a window (``window_size=(left, 0)`` and ``window_attn_skip_freq``) sees the ``left`` keys
    before its own and no earlier ones.  With ``softmax_type=learnable`` each head has a sink, the parameter
    ``softmax_offset`` [n / tp].
    """

    def __init__(self, config: TransformerConfig, layer_number: int, *args: Any, **options: Any) -> None:
        super().__init__(config, layer_number, *args, **options)
        self.left = left_of_layer(config, layer_number)
        self._tp_group = getattr(options["pg_collection"], "tp", None)
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

    def _held_queries(self, packed: PackedSeqParams, device: torch.device) -> ContextParallelQueries:
        """Return the queries of this context-parallel rank with the keys of the window only."""
        whole, left = super()._held_queries(packed, device), self.left
        if left is None:
            return whole
        kept: dict[int, ContextParallelQueries] = packed.__dict__.setdefault("_held_queries_of_windows", {})
        if left not in kept:
            bounds = tuple((max(start, position - left), position) for start, position in whole.bounds)
            kept[left] = replace(whole, starts=torch.maximum(whole.starts, whole.positions - left), bounds=bounds)
        return kept[left]

    def _attend(self, q: Tensor, k: Tensor, v: Tensor, allowed: Tensor | None = None, causal: bool = False) -> Tensor:
        """Return the attention within the window; long causal sequences are computed one block of queries at a time."""
        left = self.left
        if left is None or (causal and q.size(2) <= left + 1):
            return self._weighted(q, k, v, allowed, causal)
        if allowed is not None:
            return self._weighted(q, k, v, within_window(allowed, left))
        if not causal:  # the last query sees the end of the cache
            first = max(k.size(2) - left - 1, 0)
            return self._weighted(q, k[:, :, first:], v[:, :, first:])
        k, v = (repeated(x, q.size(1)) for x in (k, v))
        out = [
            self._weighted(q[:, :, queries], k[:, :, keys], v[:, :, keys], block_mask(queries, keys, left, q.device))
            for queries, keys in window_blocks(q.size(2), left)
        ]
        return torch.cat(out, dim=2)

    def _weighted(self, q: Tensor, k: Tensor, v: Tensor, allowed: Tensor | None = None, causal: bool = False) -> Tensor:
        if self.softmax_offset is None:
            return super()._attend(q, k, v, allowed, causal)
        dropout, scale = self.attention_dropout if self.training else 0.0, self.softmax_scale
        sinks = self.softmax_offset
        return attend_with_sinks(q, k, v, sinks, allowed=allowed, causal=causal, scale=scale, dropout=dropout)


def sinks_of_layer(config: Any, tp_size: int) -> Tensor | None:
    """Return the sinks of the heads that a tensor-parallel rank holds, [n / tp] in ``params_dtype``, all 0 at first.

    `repairs.mark_weights_for_the_norm` marks them as cut, so that the norm of the gradient counts all heads.  They
    are a parameter for ``softmax_type=learnable``, constant for ``off-by-one``, and None for ``vanilla``.
    """
    if not has_sinks(config):
        return None
    zeros = torch.zeros(config.num_attention_heads // tp_size, dtype=config.params_dtype)
    if getattr(config.softmax_type, "value", config.softmax_type) == "off-by-one":
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
    windowed = is_layer_window_attention(config.window_size, config.window_attn_skip_freq, layer_number)
    return int(config.window_size[0]) if windowed else None


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
    positions = torch.arange(keys.start, keys.stop, device=device)
    return (positions <= own) & (positions >= own - left)


def within_window(allowed: Tensor, left: int) -> Tensor:
    """Return the mask ``allowed [..., queries, keys]`` bool without the keys that lie before the window of each query.

    The own key of a query is the last key that ``allowed`` grants it, as in causal masks and in a cache whose rows
    have unequal lengths.
    """
    keys = torch.arange(allowed.size(-1), device=allowed.device)
    own = torch.where(allowed, keys, -1).amax(-1, keepdim=True)
    return allowed & (keys >= own - left)
