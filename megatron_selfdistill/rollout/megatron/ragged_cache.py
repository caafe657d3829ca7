# Copyright (c) 2026 the megatron_selfdistill authors. Apache-2.0.
"""The KV cache of prompts of unequal length."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from megatron_selfdistill.compat import repairs  # noqa: F401  isort: skip  (must come before megatron.core)
from megatron.core.inference.contexts import StaticInferenceContext


class RaggedCache(StaticInferenceContext):
    """A KV cache in which each row has a column of its own.

    Prompts of unequal length are read as Megatron reads prompts of equal length: from column 0 on, with padding at the
    end.  After `start_decoding` each row continues where its prompt ended (`CachedAttention`).  So the column of a
    token is its position in any batch, and no embedding of positions sees the padding.
    """

    columns: Tensor
    """Column in which the next pass puts the first keys and values of each row, ``[b]`` int64."""
    places: Tensor
    """Column of each token of the present pass, ``[s, b]`` int64; s is 1 but in a pass of `later_part`."""
    decodes = False
    """Whether prompts have been read, so that each pass reads one token per row."""
    multiple = 1
    """The number of which `num_columns` is a multiple while the cache decodes, if it has room."""
    prompt_lengths: Tensor
    """The tokens of each prompt, which the state of a recurrent layer has read before decoding, ``[b]`` int64."""

    def __init__(self, max_batch_size: int, max_sequence_length: int, lengths: Tensor) -> None:
        """Make an empty cache; ``lengths [b]``: the tokens of each prompt."""
        super().__init__(max_batch_size, max_sequence_length)
        self.prompt_lengths = lengths
        self.layers_with_state: set[int] = set()
        """The numbers of the layers whose memory is a state, without columns."""

    def last_of_prompts(self, states: Tensor) -> Tensor:
        """Return the states ``[1, b, h]`` of the last tokens of the next b prompts, from all states ``[s, b, h]``."""
        rows = torch.arange(states.size(1), device=states.device)
        return states[self.prompt_lengths[self.batch_size_offset + rows] - 1, rows].unsqueeze(0)

    def start_decoding(self, longest: int) -> None:
        """Read one token per row in each pass from now on; ``longest`` is the greatest of the prompts' lengths."""
        lengths = self.prompt_lengths
        self.columns = lengths.clone()  # which `advance` changes
        self._end = longest + 1
        self.decodes = True
        self.enable_decode_mode()
        unread = (torch.arange(self.max_sequence_length, device=lengths.device)[:, None] >= lengths)[:, :, None, None]
        for layer_number, memories in self.key_value_memory_dict.items():
            for memory in memories if layer_number not in self.layers_with_state else ():
                memory.masked_fill_(unread, 0)  # 0 * NaN is NaN

    def restore(self, rows: Sequence[Mapping[int, tuple[Tensor, Tensor]]]) -> None:
        """Fill the first columns of each row: for each layer, keys and values ``[n, heads, channels]`` of n tokens."""
        for layer_number, parts in rows[0].items():
            memories = [x.new_zeros(self.max_sequence_length, len(rows), *x.shape[1:]) for x in parts]
            for i, row in enumerate(rows):
                for memory, part in zip(memories, row[layer_number], strict=True):
                    memory[: len(part), i] = part
            self.key_value_memory_dict[layer_number] = tuple(memories)

    def row(self, index: int, num_tokens: int) -> dict[int, tuple[Tensor, Tensor]]:
        """Return a copy of the first ``num_tokens`` columns of a row, as `restore` takes it."""
        memories = self.key_value_memory_dict.items()
        return {number: (k[:num_tokens, index].clone(), v[:num_tokens, index].clone()) for number, (k, v) in memories}

    def later_part(self, rows: slice, starts: Tensor, end: int) -> RaggedCache:
        """Return the ``rows`` of this cache as one whose next pass reads several tokens, from ``starts [b]`` on.

        The pass writes into this cache, no column behind ``end``, and gives the state of the last token of each prompt.
        """
        part = RaggedCache(len(starts), self.max_sequence_length, self.prompt_lengths[rows] - starts)
        part.columns, part._end, part.decodes = starts, end, True
        part.enable_decode_mode()
        for layer_number, (keys, values) in self.key_value_memory_dict.items():
            part.key_value_memory_dict[layer_number] = keys[:, rows], values[:, rows]
        return part

    def keep(self, rows: Tensor) -> None:
        """Drop all sequences but ``rows``."""
        for layer_number, (keys, values) in self.key_value_memory_dict.items():
            self.key_value_memory_dict[layer_number] = keys[:, rows], values[:, rows]
        self.max_batch_size, self.columns = rows.numel(), self.columns[rows]

    def begin_pass(self, num_tokens: int) -> None:
        """Let the next pass read ``num_tokens`` tokens of each row."""
        self.places = self.columns + torch.arange(num_tokens, device=self.columns.device)[:, None]

    def advance(self) -> None:
        """Move each row on by one token."""
        self.columns += 1
        self._end += 1

    @property
    def num_columns(self) -> int:
        """The number of columns that the next pass reads, from the first one on."""
        return int(min(-(-self._end // self.multiple) * self.multiple, self.max_sequence_length))

    @property
    def hidden(self) -> Tensor:
        """Mask ``[b, 1, s, num_columns]`` bool of the columns behind each token's own, which attention does not see."""
        return (torch.arange(self.num_columns, device=self.columns.device) > self.places.t()[:, :, None])[:, None]

    def write(self, layer_number: int, key: Tensor, value: Tensor) -> tuple[Tensor, Tensor]:
        """Store ``key`` and ``value`` at the tokens' columns and return all keys and values of the layer so far.

        ``key`` and ``value`` are ``[s, b, heads, channels]``, the results ``[num_columns, b, heads, channels]``.
        """
        rows = torch.arange(self.columns.numel(), device=self.columns.device)
        keys, values = self.key_value_memory_dict[layer_number]
        keys[self.places, rows], values[self.places, rows] = key, value
        return keys[: self.num_columns], values[: self.num_columns]

    def rows_of(self, table: Tensor) -> Tensor:
        """Return the entries of ``table [positions, 1, 1, channels]`` at the tokens' columns, [s, b, 1, channels]."""
        return table[self.places].squeeze(2)
