# Copyright (c) 2026 the megatron_selfdistill authors. Apache-2.0.
"""Packed microbatches as values: their tokens, their segments and the positions of the response tokens."""

from __future__ import annotations

import math
from dataclasses import dataclass

from torch import Tensor


@dataclass(frozen=True)
class Microbatch:
    """One packed sequence of S tokens: segments of contexts with padding, then segments that are only padding."""

    tokens: Tensor
    """Token ids [S] int64; 0 at padding."""
    position_ids: Tensor
    """Positions [S] int64, from 0 in each segment, its padding included; 0 in segments that are only padding,
    which may be longer than the model's positions."""
    cu_seqlens: Tensor
    """Beginning of each segment [num_segments + 1] int32, from 0 to S."""
    padding_mask: Tensor
    """Mask [S] bool, True at padding."""
    response_positions: Tensor
    """Positions [R] int64 whose hidden states predict the response tokens, in ascending order."""
    response_ids: Tensor
    """Index [R] int64, in ``PackedBatch.response_tokens``, of the token that each of ``response_positions``
    predicts.  Where the teacher reads responses several times, reading k of token i is ``k * R_total + i``."""
    num_sequences: int
    """Number of segments with contexts; 0 in a microbatch without loss."""

    @property
    def max_seqlen(self) -> int:
        """Length of the longest segment, padding included."""
        return int(self.cu_seqlens.diff().max())


@dataclass(frozen=True)
class PackedBatch:
    """The microbatches of one data-parallel rank in one step; each reading has every response token once."""

    seq_length: int
    """Length S of all microbatches of both roles, equal on all ranks."""
    student: list[Microbatch]
    teacher: list[Microbatch]
    """The teacher's readings: of its own contexts, and of those of the controls.  In a paired batch the readings of
    the contexts of a student's microbatch follow each other."""
    response_tokens: Tensor
    """Response tokens [R_total] int64 of all contexts, in the order of the contexts."""
    num_contexts: int
    segment_multiple: int
    """Number of which the length of each segment is a multiple (`PackingRules.segment_multiple`)."""
    num_controls: int = 0
    """Number of controls of the target: the teacher reads each response once more for each of them."""
    paired: bool = False
    """As in `PackingRules`.  The schedule then alternates between the roles; otherwise the teacher comes first."""


@dataclass(frozen=True)
class PackingRules:
    """The sizes of packed sequences, equal on all ranks."""

    max_tokens: int
    """Largest number of tokens of a microbatch."""
    cp_size: int
    """Number of context-parallel ranks; with several, each segment is padded to a multiple of ``2 * cp_size``, so that
    context parallelism can divide it."""
    tp_size: int
    """Number of tensor-parallel ranks, of which the length of a packed sequence is a multiple."""
    paired: bool
    """Whether microbatch i of student and teacher has the same contexts in the same order; otherwise the teacher's
    contexts are packed by themselves."""
    seq_multiple: int | None = None
    """Another number of which the length of a packed sequence is a multiple; None is 1."""
    joins_turns: bool = False
    """Whether a context that continues the context before it shares the segment of that context (`segments_of`)."""
    num_controls: int = 0
    """As in `PackedBatch`."""

    @property
    def segment_multiple(self) -> int:
        """Number of which the length of each segment is a multiple."""
        return 2 * self.cp_size if self.cp_size > 1 else 1

    @property
    def capacity(self) -> int:
        """Greatest length of a packed sequence: the largest multiple of ``length_multiple`` within ``max_tokens``."""
        return self.max_tokens // self.length_multiple * self.length_multiple

    @property
    def length_multiple(self) -> int:
        """Number of which the length of a packed sequence is a multiple."""
        return math.lcm(self.segment_multiple * self.tp_size, self.seq_multiple or 1)
