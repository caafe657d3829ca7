# Copyright (c) 2026 the megatron_selfdistill authors. Apache-2.0.
"""Rows of context pairs: microbatches in which each context has a row of its own, for models that cannot be packed.

Some layers carry a state from token to token, and Megatron Core cannot reset this state between the segments of a
packed sequence.  A row holds one context and padding behind it.  A causal model computes nothing at a token from the
tokens after it, so that padding changes no state that the loss reads.

A data-parallel rank calls, where the caller provides the all-reduces::

    length = all_reduce_max(required_row_length(contexts, rules))
    count = row_count(all_reduce_max(len(contexts)), length, rules.max_tokens)
    batch = in_rows(contexts, rules, length, count)
    batch = pad_to_count(batch, all_reduce_max(len(batch.student)), all_reduce_max(len(batch.teacher)))
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import replace

import torch

from megatron_selfdistill.data.contexts import ContextPair
from megatron_selfdistill.data.packing import (
    Microbatch,
    PackedBatch,
    PackingRules,
    microbatch_of,
    require_prompts,
    round_up,
)


def required_row_length(contexts: Sequence[ContextPair], rules: PackingRules, *, seq_quantum: int | None = None) -> int:
    """Return the smallest length of a row into which each context of both roles fits.

    The length is a multiple of ``rules.length_multiple``; it is at most ``rules.max_tokens``, and the least such
    multiple if there are no contexts.  With ``seq_quantum`` it is also rounded up to a multiple of ``seq_quantum``
    where ``max_tokens`` leaves room.

    Raises: ValueError if a context is longer than ``max_tokens`` or has an empty prompt, and for context parallelism,
    whose cuts of a row Megatron Core computes for no model that needs rows.
    """
    if rules.cp_size > 1:
        raise ValueError(
            f"cp_size: expected 1, since context parallelism cannot cut rows of one sequence each, got {rules.cp_size}."
        )
    require_prompts(contexts)
    multiple = rules.length_multiple
    capacity = rules.max_tokens // multiple * multiple
    if capacity < 1:
        raise ValueError(
            f"max_tokens: expected at least {multiple}, of which the length of a row must be a multiple (tp_size "
            f"{rules.tp_size}, seq_multiple {rules.seq_multiple}), got {rules.max_tokens}."
        )
    longest = multiple
    for context in contexts:
        length = max(context.student_length, context.teacher_length)
        if length > capacity:
            raise ValueError(
                f"Problem {context.problem_id}: expected contexts of at most {capacity} tokens, the longest row "
                f"within max_tokens, got {length}; raise max_tokens, or lower the length that contexts may have."
            )
        longest = max(longest, length)
    return min(round_up(longest, math.lcm(multiple, seq_quantum or 1)), capacity)


def row_count(num_contexts: int, length: int, max_tokens: int) -> int:
    """Return the number of rows of a microbatch of at most ``max_tokens`` tokens, for the fewest microbatches.

    ``num_contexts``: the contexts of the replica that has most.  ``length``: the length of a row.
    """
    num_microbatches = max(1, -(-num_contexts // (max_tokens // length)))
    return max(1, -(-num_contexts // num_microbatches))


def in_rows(contexts: Sequence[ContextPair], rules: PackingRules, length: int, count: int) -> PackedBatch:
    """Return microbatches of ``count`` rows of ``length`` tokens, the contexts in their order.

    Microbatch i of student and teacher has the same contexts in the same rows.  No contexts give no microbatches.
    ``length`` and ``count`` are equal on all data-parallel ranks.  Collectives: none.

    Raises: ValueError as `required_row_length`, and for a ``length`` that is too small or no multiple.
    """
    need = required_row_length(contexts, rules)
    if length % rules.length_multiple or not need <= length * count <= rules.max_tokens or length < need:
        raise ValueError(
            f"length, count: expected rows of a multiple of {rules.length_multiple} tokens, at least {need} (what "
            f"these contexts need), and at most {rules.max_tokens} tokens (max_tokens) in all rows, got {count} rows "
            f"of {length} tokens."
        )
    offsets = [0]
    for context in contexts:
        offsets.append(offsets[-1] + len(context.response))

    def microbatches(prompts: Sequence[list[int]]) -> list[Microbatch]:
        rows = [(prompts[i], context.response, offsets[i]) for i, context in enumerate(contexts)]
        return [_microbatch(rows[first : first + count], length, count) for first in range(0, len(rows), count)]

    return PackedBatch(
        seq_length=length * count,
        student=microbatches([context.student_prompt for context in contexts]),
        teacher=microbatches([context.teacher_prompt for context in contexts]),
        response_tokens=torch.tensor([t for context in contexts for t in context.response], dtype=torch.int64),
        guided=torch.tensor([context.guided for context in contexts for _ in context.response], dtype=torch.bool),
        num_contexts=len(contexts),
        segment_multiple=length,
        num_rows=count,
    )


def _microbatch(rows: Sequence[tuple[list[int], list[int], int]], length: int, count: int) -> Microbatch:
    """Return the rows as one microbatch; the positions of padding are 0, since a row may exceed the model's."""
    microbatch = microbatch_of(rows, length * count, length)
    position_ids = microbatch.position_ids.masked_fill(microbatch.padding_mask, 0)
    return replace(microbatch, position_ids=position_ids, num_rows=count)
