# Copyright (c) 2026 the megatron_selfdistill authors. Apache-2.0.
"""Packing of context pairs into microbatches of one length, for the student and for the teacher.

A data-parallel rank calls, where the caller provides the all-reduces::

    seq_length = all_reduce_max(required_seq_length(contexts, rules))
    packed = pack(contexts, rules, seq_length=seq_length)
    packed = pad_to_count(packed, all_reduce_max(len(packed.student)), all_reduce_max(len(packed.teacher)))
"""

from __future__ import annotations

import math
import operator
from collections.abc import Sequence
from dataclasses import replace
from itertools import accumulate, pairwise

import torch
from torch import Tensor

from megatron_selfdistill.data.contexts import ContextPair
from megatron_selfdistill.data.packed_batch import Microbatch, PackedBatch, PackingRules


def required_seq_length(contexts: Sequence[ContextPair], rules: PackingRules, *, seq_quantum: int | None = None) -> int:
    """Return the smallest length S with which the contexts are packed as with the length ``rules.max_tokens``.

    S is a multiple of ``rules.length_multiple``; it is at most ``max_tokens``, and the least such multiple if there are
    no contexts.  With ``seq_quantum`` (`length_quantum`) S is also rounded up to a multiple of ``seq_quantum`` where
    ``max_tokens`` leaves room.  The maximum of S over the data-parallel ranks is the ``seq_length`` for `pack`: every
    length from S to ``max_tokens`` packs the same contexts together.

    Raises: ValueError if a context is longer than ``max_tokens``, or has an empty prompt.
    """
    multiple, capacity = rules.length_multiple, rules.capacity
    roles = padded_lengths(contexts, rules)
    need = 0
    for lengths, sequences in zip(roles, planned_sequences(*roles, capacity, paired=rules.paired), strict=True):
        need = max(need, *(sum(lengths[index] for index in sequence) for sequence in sequences), 0)
    return max(multiple, min(round_up(need, math.lcm(multiple, seq_quantum or 1)), capacity))


def length_quantum(max_tokens: int) -> int:
    """Return the step between the lengths of packed sequences on a GPU, in tokens: a power of two up to 256.

    Without it, almost every training step would have new shapes: the allocator would find no free block of the right
    size, and kernels would be chosen and compiled again.  The step is at most a sixteenth of ``max_tokens``, so that
    padding costs little.
    """
    return 1 << min(8, max(0, (max_tokens // 16).bit_length() - 1))


def pack(contexts: Sequence[ContextPair], rules: PackingRules, *, seq_length: int | None = None) -> PackedBatch:
    """Return microbatches of S tokens: the longest context comes first, into the first microbatch with room.

    ``seq_length``: S, equal on all data-parallel ranks; by default the length that these contexts need.  No contexts
    give no microbatches.  The result is deterministic.  Collectives: none.

    Raises: ValueError as `required_seq_length`.
    """
    need = required_seq_length(contexts, rules)
    segments = segments_of(contexts, rules)
    length = need if seq_length is None else seq_length
    student, teacher = planned_sequences(*padded_lengths(contexts, rules), length, paired=rules.paired)
    offsets = list(accumulate((len(context.response) for context in contexts), initial=0))

    def microbatches(readings: list[list[list[int]]], sequences: list[list[int]]) -> list[Microbatch]:
        def turns(index: int) -> tuple[list[Turn], int]:
            reading, segment = index // len(segments), segments[index % len(segments)]
            prompts = readings[reading]
            return [(prompts[i], contexts[i].response) for i in segment], reading * offsets[-1] + offsets[segment[0]]

        return [
            microbatch_of([turns(index) for index in sequence], length, rules.segment_multiple)
            for sequence in sequences
        ]

    of_teacher = [[context.readings[k] for context in contexts] for k in range(1 + rules.num_controls)]

    return PackedBatch(
        seq_length=length,
        student=microbatches([[context.student_prompt for context in contexts]], student),
        teacher=microbatches(of_teacher, teacher),
        response_tokens=_int64([token for context in contexts for token in context.response]),
        num_contexts=len(contexts),
        segment_multiple=rules.segment_multiple,
        num_controls=rules.num_controls,
        paired=rules.paired,
    )


def pad_to_count(packed: PackedBatch, num_student: int, num_teacher: int) -> PackedBatch:
    """Return ``packed`` with microbatches of padding after the microbatches of student and teacher.

    Every data-parallel rank then runs ``num_student`` and ``num_teacher`` microbatches.  The added microbatches have no
    response positions, and thus no loss and no gradient.
    """
    padding = microbatch_of([], packed.seq_length, packed.segment_multiple)
    return replace(
        packed,
        student=packed.student + [padding] * (num_student - len(packed.student)),
        teacher=packed.teacher + [padding] * (num_teacher - len(packed.teacher)),
    )


def require_prompts(contexts: Sequence[ContextPair]) -> None:
    """Raise ValueError for an empty prompt, which has no hidden state that predicts the first response token."""
    for context in contexts:
        if not context.student_prompt or not all(context.readings):
            raise ValueError(
                f"Problem {context.problem_id}: expected at least one token in each prompt, since the hidden "
                "state of the last one predicts the response, got an empty prompt; let the chat template "
                "begin with a token."
            )


def segments_of(contexts: Sequence[ContextPair], rules: PackingRules) -> list[range]:
    """Return the indices of the contexts of each segment, in order: one context, or turns that continue each other.

    With ``rules.joins_turns`` a context joins the one before it if both of its prompts begin with the tokens of that
    one, its response included.  A model with causal attention reads each response after the same tokens either way, so
    that values and gradients stay the same, and the turns are read once and not once per turn.
    """
    starts = [i for i in range(len(contexts)) if not (rules.joins_turns and i and _continues(*contexts[i - 1 : i + 1]))]
    return [range(start, end) for start, end in pairwise([*starts, len(contexts)])]


def _continues(before: ContextPair, after: ContextPair) -> bool:
    prompts = (before.student_prompt, after.student_prompt), (before.teacher_prompt, after.teacher_prompt)
    return bool(before.response) and all(
        longer[: len(prompt)] == prompt and longer[len(prompt) : len(prompt) + len(before.response)] == before.response
        for prompt, longer in prompts
    )


def padded_lengths(contexts: Sequence[ContextPair], rules: PackingRules) -> tuple[list[int], list[int]]:
    """Return the lengths of the segments of student and teacher (`segments_of`), padded to ``rules.segment_multiple``.

    The teacher's are those of its own contexts, then those of the contexts of each control.
    Raises: ValueError if a context is longer than ``rules.max_tokens`` allows, has an empty prompt, or has fewer
    controls than ``rules``.
    """
    require_prompts(contexts)
    capacity = rules.capacity
    lasts = [contexts[segment[-1]] for segment in segments_of(contexts, rules)]
    for context in contexts:
        if len(context.control_prompts) < rules.num_controls:
            raise ValueError(
                f"Problem {context.problem_id}: expected {rules.num_controls} control prompts beside the teacher's "
                f"prompt, as the target has controls; got {len(context.control_prompts)}."
            )
    student = [round_up(context.student_length, rules.segment_multiple) for context in lasts]
    teacher = [
        round_up(len(context.readings[k]) + len(context.response), rules.segment_multiple)
        for k in range(1 + rules.num_controls)
        for context in lasts
    ]
    for role, lengths in (("student", student), ("teacher", teacher)):
        longest = max(range(len(lengths)), key=lengths.__getitem__, default=None)
        if longest is not None and lengths[longest] > capacity:
            raise ValueError(
                f"Problem {lasts[longest % len(lasts)].problem_id}: expected a {role}'s context of at most "
                f"{capacity} tokens, the longest packed sequence within max_tokens, got {lengths[longest]} (padding "
                "for context parallelism included); raise max_tokens, or lower the length that contexts may have."
            )
    return student, teacher


def planned_sequences(
    student: list[int], teacher: list[int], capacity: int, *, paired: bool
) -> tuple[list[list[int]], list[list[int]]]:
    """Return the segments of each microbatch of student and teacher, from the results of `padded_lengths`.

    Segment i of reading k of the teacher is ``k * len(student) + i``.
    Each segment goes into the first microbatch of at most ``capacity`` tokens with room, the longest segment first.
    No length exceeds ``capacity``.  ``paired``: as in `PackingRules`.
    """
    if paired:
        number = len(student)
        readings = [teacher[start : start + number] for start in range(0, len(teacher), number)] if number else []
        sequences = _first_fit_decreasing([student, *readings], capacity)
        return sequences, [[k * number + i for i in sequence] for sequence in sequences for k in range(len(readings))]
    return _first_fit_decreasing([student], capacity), _first_fit_decreasing([teacher], capacity)


def _first_fit_decreasing(lengths_by_role: list[list[int]], capacity: int) -> list[list[int]]:
    # Context i has the length lengths_by_role[k][i] for role k, and goes into the first microbatch where it fits for
    # all roles.  Contexts of equal length keep their order, so that the result is the same on every machine.
    lengths = list(zip(*lengths_by_role, strict=True))
    sequences: list[list[int]] = []
    room: list[tuple[int, ...]] = []
    for index in sorted(range(len(lengths)), key=lambda i: -max(lengths[i])):
        for number, left in enumerate(room):
            rest = tuple(map(operator.sub, left, lengths[index]))
            if min(rest) >= 0:
                sequences[number].append(index)
                room[number] = rest
                break
        else:
            sequences.append([index])
            room.append(tuple(capacity - length for length in lengths[index]))
    return sequences


Turn = tuple[list[int], list[int]]
"""A prompt and the response that follows it."""


def microbatch_of(segments: Sequence[tuple[Sequence[Turn], int]], seq_length: int, segment_multiple: int) -> Microbatch:
    """Return the packed sequence of ``segments``: (turns, index of their first response token in all responses).

    The last turn of a segment has all tokens of the segment.  ``segment_multiple``: the number of which the length of
    each segment is a multiple, as ``seq_length`` is.
    """
    tokens = torch.zeros(seq_length, dtype=torch.int64)
    position_ids = torch.zeros(seq_length, dtype=torch.int64)
    padding_mask = torch.ones(seq_length, dtype=torch.bool)
    bounds = [0]
    response_positions = [torch.empty(0, dtype=torch.int64)]
    response_ids = [torch.empty(0, dtype=torch.int64)]
    for turns, offset in segments:
        whole = turns[-1][0] + turns[-1][1]
        start, length = bounds[-1], len(whole)
        end = start + round_up(length, segment_multiple)
        tokens[start : start + length] = _int64(whole)
        position_ids[start:end] = torch.arange(end - start)
        padding_mask[start : start + length] = False
        for prompt, response in turns:
            first = start + len(prompt) - 1  # the position whose hidden state predicts the first response token
            response_positions.append(torch.arange(first, first + len(response)))
            response_ids.append(torch.arange(offset, offset + len(response)))
            offset += len(response)
        bounds.append(end)
    piece = padding_length(seq_length, segment_multiple)
    while bounds[-1] < seq_length:
        bounds.append(min(bounds[-1] + piece, seq_length))
    return Microbatch(
        tokens=tokens,
        position_ids=position_ids,
        cu_seqlens=torch.tensor(bounds, dtype=torch.int32),
        padding_mask=padding_mask,
        response_positions=torch.cat(response_positions),
        response_ids=torch.cat(response_ids),
        num_sequences=len(segments),
    )


def padding_length(seq_length: int, segment_multiple: int) -> int:
    """Return the length of a segment that is only padding, a multiple of ``segment_multiple`` tokens.

    Attention costs the square of a segment's length, so one segment of padding could cost more than all contexts.  A
    segment has 256 multiples, and more where a packed sequence would have over 256 of them: Transformer Engine rounds
    the number of segments up to a power of two, at most to 512, before it chooses and compiles a kernel.
    """
    return segment_multiple * max(256, -(-seq_length // (256 * segment_multiple)))


def round_up(value: int, multiple: int) -> int:
    """Return the least multiple of ``multiple`` that is at least ``value``."""
    return -(-value // multiple) * multiple


def _int64(values: list[int]) -> Tensor:
    return torch.tensor(values, dtype=torch.int64)
