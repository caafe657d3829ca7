# Copyright (c) 2026 the megatron_selfdistill authors. Apache-2.0.
"""The order in which context-parallel ranks share the tokens of a packed sequence."""

from __future__ import annotations

from itertools import pairwise

import torch
from torch import Tensor


def context_parallel_positions(cu_seqlens: Tensor, cp_size: int, cp_rank: int) -> Tensor:
    """Return the positions [S / cp_size] int64 of a packed sequence that one context-parallel rank holds.

    Each segment is divided into ``2 * cp_size`` equal chunks; rank r holds the chunks r and ``2 * cp_size - 1 - r``, so
    that all ranks compute equally many causal pairs.  This is Transformer Engine's order for packed sequences
    (``thd_get_partitioned_indices``), and with one segment Megatron's (``get_batch_on_this_cp_rank``).

    Raises: ValueError if a segment does not divide by ``2 * cp_size``.
    """
    bounds = cu_seqlens.tolist()
    if cp_size == 1:
        return torch.arange(bounds[-1])
    parts = []
    for start, end in pairwise(bounds):
        chunk, rest = divmod(end - start, 2 * cp_size)
        if rest:
            raise ValueError(
                f"Expected segments whose length is a multiple of {2 * cp_size} (2 * cp_size), got "
                f"{end - start} tokens from {start} to {end}; pack with the same cp_size."
            )
        for index in (cp_rank, 2 * cp_size - 1 - cp_rank):
            parts.append(torch.arange(start + index * chunk, start + (index + 1) * chunk))
    return torch.cat(parts)
