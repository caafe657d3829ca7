# Copyright (c) 2026 the megatron_selfdistill authors. Apache-2.0.
"""Megatron's static KV cache: its size, the sequences that stay in it, and a cache with rows of unequal length.

Keys and values lie in ``context.key_value_memory_dict[layer_number]``, ``[columns, b, heads, channels]`` each.
"""

from __future__ import annotations

import contextlib
import os
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import psutil
import torch
from torch import Tensor

from megatron_selfdistill.compat import repairs  # noqa: F401  isort: skip  (must come before megatron.core)
from megatron.core.inference.contexts import StaticInferenceContext
from megatron.core.models.common.embeddings.rope_utils import _apply_rotary_pos_emb_bshd
from megatron.core.models.common.embeddings.yarn_rotary_pos_embedding import (
    _yarn_get_concentration_factor_from_config,
)
from megatron.core.transformer.attention import Attention
from megatron.core.transformer.enums import AttnMaskType
from megatron.core.transformer.multi_latent_attention import MultiLatentAttention

from megatron_selfdistill.model.gated_delta_net import GatedDeltaNet


def cache_bytes_per_token(models: Sequence[torch.nn.Module], dtype: torch.dtype) -> int:
    """Return the bytes that ``Attention._allocate_memory`` takes per sequence and position, over this rank's layers."""
    layers = list(_attention_layers(models))
    values = sum(m.num_query_groups_per_partition * (m.key_hidden_size + m.val_hidden_size) for m in layers)
    return max(1, int(values) * dtype.itemsize)  # a stage may have no layer


def state_bytes(models: Sequence[torch.nn.Module]) -> int:
    """Return the bytes of the states of recurrent layers per sequence, over this rank's layers."""
    return sum(m.state_bytes for model in models for m in model.modules() if isinstance(m, GatedDeltaNet))


def free_bytes() -> int:
    """Return the free memory of this rank in bytes: of its GPU, or its share of the machine's main memory."""
    if torch.cuda.is_available():
        cached = torch.cuda.memory_reserved() - torch.cuda.memory_allocated()
        return torch.cuda.mem_get_info()[0] + cached
    return int(psutil.virtual_memory().available) // int(os.environ.get("LOCAL_WORLD_SIZE", "1"))


def keep_rows(context: StaticInferenceContext, rows: Tensor) -> None:
    """Drop all sequences but ``rows`` from the cache."""
    cache = context.key_value_memory_dict
    for layer_number, (keys, values) in cache.items():
        cache[layer_number] = keys[:, rows], values[:, rows]
    context.max_batch_size = rows.numel()


class RaggedCache(StaticInferenceContext):
    """A KV cache in which each row has a column of its own.

    Prompts of unequal length are read as Megatron reads prompts of equal length: from column 0 on, with padding at the
    end.  After `start_decoding` each row continues where its prompt ended (`RaggedAttention`).  So the column of a
    token is its position in any batch, and no embedding of positions sees the padding.
    """

    columns: Tensor
    """Column in which the next pass, of one token per row, puts the keys and values of each row, ``[b]`` int64."""
    decodes = False
    """Whether prompts have been read, so that each pass reads one token per row."""
    state_lengths: Tensor
    """The tokens that the state of a recurrent layer has read before decoding: all of the prompt but the last,
    ``[b]`` int64."""

    def __init__(self, max_batch_size: int, max_sequence_length: int, lengths: Tensor) -> None:
        """Make an empty cache; ``lengths [b]``: the tokens of each prompt."""
        super().__init__(max_batch_size, max_sequence_length)
        self.state_lengths = lengths - 1
        self.layers_with_state: set[int] = set()
        """The numbers of the layers whose memory is a state, without columns (`model.gated_delta_net`)."""

    def start_decoding(self, lengths: Tensor, num_columns: int) -> None:
        """Read one token per row in each pass from now on.

        The first pass reads the last token of each prompt again, since a pass over padded prompts gives no logits for
        it. ``lengths [b]`` are the tokens of each prompt; ``num_columns`` is the greatest of them.
        """
        self.columns = lengths - 1
        self.num_columns = num_columns
        self.decodes = True
        self.enable_decode_mode()
        unread = (torch.arange(self.max_sequence_length, device=lengths.device)[:, None] >= lengths)[:, :, None, None]
        for layer_number, memories in self.key_value_memory_dict.items():
            for memory in memories if layer_number not in self.layers_with_state else ():
                memory.masked_fill_(unread, 0)  # 0 * NaN is NaN

    def advance(self) -> None:
        """Move each row on by one token."""
        self.columns = self.columns + 1
        self.num_columns += 1

    def keep(self, rows: Tensor) -> None:
        """Drop all sequences but ``rows``."""
        keep_rows(self, rows)
        self.columns = self.columns[rows]

    @property
    def hidden(self) -> Tensor:
        """Mask ``[b, 1, 1, num_columns]`` bool of the columns behind each row's own; True is hidden from attention."""
        columns = torch.arange(self.num_columns, device=self.columns.device)
        return (columns > self.columns[:, None])[:, None, None]

    def write(self, layer_number: int, key: Tensor, value: Tensor) -> tuple[Tensor, Tensor]:
        """Store ``key`` and ``value`` at the rows' columns and return all keys and values of the layer so far.

        ``key`` and ``value`` are ``[1, b, heads, channels]``, the results ``[num_columns, b, heads, channels]``.
        """
        rows = torch.arange(self.columns.numel(), device=self.columns.device)
        keys, values = self.key_value_memory_dict[layer_number]
        keys[self.columns, rows], values[self.columns, rows] = key[0], value[0]
        return keys[: self.num_columns], values[: self.num_columns]

    def rows_of(self, table: Tensor) -> Tensor:
        """Return the entries of ``table [positions, 1, 1, channels]`` at the rows' columns, ``[1, b, 1, channels]``."""
        return table[self.columns].transpose(0, 1)


class RaggedAttention:
    """The attention of a model that decodes with a `RaggedCache`.

    Megatron's own attention has one offset for all rows and takes no mask.

    Two functions are replaced during a pass: the step of each attention layer that writes and reads the cache and, in
    multi-latent attention, the table of rotary embeddings, which is applied before that step.
    """

    def __init__(self, models: Sequence[torch.nn.Module]) -> None:
        self._cache: RaggedCache | None = None  # of the present pass
        self._replacements: dict[int, tuple[torch.nn.Module, str, Callable[..., Any]]] = {}
        for layer in _attention_layers(models):
            self._replacements[id(layer)] = layer, "_adjust_key_value_for_inference", _ragged_step(layer)
            if isinstance(layer, MultiLatentAttention):
                rotary = layer.rotary_pos_emb
                self._replacements[id(rotary)] = rotary, "forward", self._ragged_table(rotary)

    @contextlib.contextmanager
    def reading(self, cache: RaggedCache) -> Iterator[None]:
        """Let a pass of the model decode with ``cache``."""
        self._cache = cache
        try:
            for owner, name, replacement in self._replacements.values():
                owner.__dict__[name] = replacement
            yield
        finally:
            for owner, name, _ in self._replacements.values():
                owner.__dict__.pop(name, None)
            self._cache = None

    def _ragged_table(self, rotary: torch.nn.Module) -> Callable[..., Any]:
        """Return the forward of a rotary embedding at the rows' positions only; YaRN's also returns a factor."""
        whole_table = rotary.forward

        def forward(*args: Any, **kwargs: Any) -> Any:
            assert self._cache is not None, "the function takes the place of forward during a pass only"
            table = whole_table(*args, **kwargs)
            if isinstance(table, tuple):
                return self._cache.rows_of(table[0]), *table[1:]
            return self._cache.rows_of(table)

        return forward


def _ragged_step(layer: Attention) -> Callable[..., tuple[Any, ...]]:
    """Return ``Attention._adjust_key_value_for_inference`` with each row at its own column."""

    def adjust(
        cache: RaggedCache, query: Tensor, key: Tensor, value: Tensor, rotary_pos_emb: Any, *_unused: Any
    ) -> tuple[Any, ...]:
        key, value = cache.write(layer.layer_number, key, value)
        if rotary_pos_emb is not None:
            of_queries, of_keys = cache.rows_of(rotary_pos_emb[0]), rotary_pos_emb[1][: cache.num_columns]
            rotary_pos_emb = of_queries, of_keys
            if layer.config.apply_rope_fusion:  # the fused kernel has one position for all rows, and float32 inside
                query, rotary_pos_emb = _rotated(layer, query, of_queries), (None, of_keys)
        return query, key, value, rotary_pos_emb, AttnMaskType.arbitrary, None

    return adjust


def _rotated(layer: Attention, query: Tensor, angles: Tensor) -> Tensor:
    rotated: Tensor = _apply_rotary_pos_emb_bshd(
        query.float(),
        angles,
        rotary_interleaved=layer.config.rotary_interleaved,
        mscale=_yarn_get_concentration_factor_from_config(layer.config),
    )
    return rotated.to(query.dtype)


def _attention_layers(models: Sequence[torch.nn.Module]) -> Iterator[Attention]:
    return (module for model in models for module in model.modules() if isinstance(module, Attention))
