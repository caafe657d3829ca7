# Copyright (c) 2026 the megatron_selfdistill authors. Apache-2.0.
"""The laws of packing: every response token once, one length, segments that cover, rows that predict."""

from __future__ import annotations

import math
from dataclasses import replace
from itertools import pairwise
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from megatron_selfdistill.data.context_parallel import context_parallel_positions
from megatron_selfdistill.data.contexts import ContextPair
from megatron_selfdistill.data.packed_batch import Microbatch, PackedBatch, PackingRules
from megatron_selfdistill.data.packing import pack, pad_to_count, padding_length, required_seq_length, segments_of

SHAPES = st.lists(st.tuples(st.integers(1, 9), st.integers(1, 14), st.integers(0, 12)), max_size=14)
LAYOUTS = st.fixed_dictionaries(
    {
        "cp_size": st.sampled_from([1, 2, 3]),
        "tp_size": st.sampled_from([1, 2, 4]),
        "seq_multiple": st.sampled_from([None, 8, 10]),
        "paired": st.booleans(),
        "max_tokens": st.sampled_from([130, 250]),
    }
)


def contexts_of(shapes: list[tuple[int, int, int]]) -> list[ContextPair]:
    """Return contexts in which every token is a different number, so that no test confuses two tokens."""
    number = iter(range(1, 10**6))

    def fresh(count: int) -> list[int]:
        return [next(number) for _ in range(count)]

    return [ContextPair(f"p{i}", fresh(s), fresh(t), fresh(r), False) for i, (s, t, r) in enumerate(shapes)]


def turns_of(num_turns: int, hint: int = 3) -> list[ContextPair]:
    """Return the turns of two episodes whose responses have four tokens, and replies two, after prompts of five."""
    number, turns = iter(range(1, 10**6)), []
    for name in "ab":
        student = [next(number) for _ in range(5)]
        teacher = [*[next(number) for _ in range(hint)], *student]
        for _ in range(num_turns):
            response, reply = [next(number) for _ in range(4)], [next(number) for _ in range(2)]
            turns.append(ContextPair(name, student, teacher, response, False))
            student, teacher = [*student, *response, *reply], [*teacher, *response, *reply]
    return turns


def segments(microbatch: Microbatch) -> list[tuple[int, int]]:
    bounds = microbatch.cu_seqlens.tolist()
    return list(pairwise(bounds))


def contexts_by_row(stream: list[Microbatch], prompts: list[list[int]]) -> list[list[int]]:
    index = {prompt[0]: i for i, prompt in enumerate(prompts)}
    return [[index[int(m.tokens[start])] for start, _ in segments(m)[: m.num_sequences]] for m in stream]


def check_stream(stream: list[Microbatch], prompts: list[list[int]], packed: PackedBatch, cp: int) -> None:
    seq_length = packed.seq_length
    for m in stream:
        for tensor in (m.tokens, m.position_ids, m.padding_mask):
            assert tensor.shape == (seq_length,)
        assert (m.tokens.dtype, m.position_ids.dtype, m.response_positions.dtype) == (torch.int64,) * 3
        assert (m.cu_seqlens.dtype, m.padding_mask.dtype) == (torch.int32, torch.bool)
        assert m.cu_seqlens[0] == 0 and m.cu_seqlens[-1] == seq_length
        assert (m.cu_seqlens.diff() > 0).all()
        assert m.max_seqlen == max(end - start for start, end in segments(m))
        multiple = 2 * cp if cp > 1 else 1
        only_padding = segments(m)[m.num_sequences :]
        assert all(end - start == padding_length(seq_length, multiple) for start, end in only_padding[:-1])
        for number, (start, end) in enumerate(segments(m)):
            real = int((~m.padding_mask[start:end]).sum())
            assert not m.padding_mask[start : start + real].any(), "padding is at the end"
            if number < m.num_sequences:
                assert end - start - real < multiple
                assert m.position_ids[start:end].tolist() == list(range(end - start))
            else:
                assert real == 0 and not m.position_ids[start:end].any()
                assert end - start <= padding_length(seq_length, multiple)
            assert (end - start) % multiple == 0
        assert not m.tokens[m.padding_mask].any()
        assert (m.tokens[m.response_positions + 1] == packed.response_tokens[m.response_ids]).all(), "row predicts"
    ids = torch.cat([torch.empty(0, dtype=torch.int64), *(m.response_ids for m in stream)])
    assert ids.sort().values.equal(torch.arange(packed.response_tokens.numel())), "every token once"
    placed = [i for row in contexts_by_row(stream, prompts) for i in row]
    assert sorted(placed) == list(range(packed.num_contexts))


@settings(deadline=None, max_examples=100)
@given(SHAPES, LAYOUTS)
def test_every_layout_obeys_the_laws(shapes: list[tuple[int, int, int]], layout: dict[str, Any]) -> None:
    contexts = contexts_of(shapes)
    packed = pack(contexts, PackingRules(**layout))
    cp_size, tp_size = layout["cp_size"], layout["tp_size"]
    assert packed.seq_length % (tp_size if cp_size == 1 else 2 * cp_size * tp_size) == 0
    assert packed.seq_length % (layout["seq_multiple"] or 1) == 0
    assert packed.seq_length <= layout["max_tokens"]
    assert packed.response_tokens.tolist() == [token for c in contexts for token in c.response]
    students, teachers = [c.student_prompt for c in contexts], [c.teacher_prompt for c in contexts]
    check_stream(packed.student, students, packed, cp_size)
    check_stream(packed.teacher, teachers, packed, cp_size)
    if layout["paired"]:
        assert contexts_by_row(packed.student, students) == contexts_by_row(packed.teacher, teachers)
    for stream in (packed.student, packed.teacher):
        assert all(torch.equal(microbatch.padding_mask, microbatch.tokens == 0) for microbatch in stream)


def test_one_row_written_out() -> None:
    contexts = [ContextPair("a", [11, 12], [1, 2, 3], [13], False), ContextPair("b", [21], [4], [22, 23, 24, 25], True)]
    packed = pack(contexts, PackingRules(max_tokens=32, cp_size=2, tp_size=2, seq_multiple=24, paired=False))
    (m,) = packed.student
    assert m.tokens.tolist() == [21, 22, 23, 24, 25, 0, 0, 0, 11, 12, 13, 0] + [0] * 12
    assert m.position_ids.tolist() == [0, 1, 2, 3, 4, 5, 6, 7, 0, 1, 2, 3] + [0] * 12
    assert m.cu_seqlens.tolist() == [0, 8, 12, 24]
    assert m.response_positions.tolist() == [0, 1, 2, 3, 9]
    assert m.response_ids.tolist() == [1, 2, 3, 4, 0]
    assert (m.num_sequences, m.max_seqlen) == (2, 12)
    assert packed.response_tokens.tolist() == [13, 22, 23, 24, 25]
    assert m.padding_mask.sum() == 16


def test_padding_microbatches_fill_up_to_the_count_also_on_a_rank_without_contexts() -> None:
    packed = pack(contexts_of([(2, 4, 3)]), PackingRules(max_tokens=16, cp_size=2, tp_size=1, paired=False))
    padded = pad_to_count(packed, 3, 2)
    assert (len(padded.student), len(padded.teacher)) == (3, 2) and padded.student[0] is packed.student[0]
    rules = PackingRules(max_tokens=64, cp_size=2, tp_size=2, paired=True)
    nothing = pack([], rules, seq_length=24)
    assert (required_seq_length([], rules), nothing.student, nothing.teacher, nothing.num_contexts) == (8, [], [], 0)
    assert nothing.response_tokens.shape == (0,) and nothing.response_tokens.dtype == torch.int64
    only = pad_to_count(nothing, 2, 2)
    assert [m.tokens.numel() for m in (*only.student, *only.teacher)] == [24] * 4
    for m in (*padded.student[1:], padded.teacher[1], *only.student, *only.teacher):
        assert m.num_sequences == m.response_positions.numel() == m.response_ids.numel() == 0
        assert m.cu_seqlens.tolist() == [0, m.tokens.numel()]
        assert m.padding_mask.all() and not m.tokens.any()


def test_what_cannot_be_packed_is_refused_by_its_problem() -> None:
    layout = {"cp_size": 1, "tp_size": 4, "paired": False}
    with pytest.raises(ValueError, match=r"p1: .*teacher.* 12 .*14"):
        pack(contexts_of([(2, 2, 2), (2, 10, 4)]), PackingRules(max_tokens=15, **layout))
    with pytest.raises(ValueError, match="p: "):
        pack([ContextPair("p", [], [1], [2], False)], PackingRules(max_tokens=32, **layout))


@settings(deadline=None, max_examples=60)
@given(SHAPES, st.sampled_from([1, 2, 3, 4]), st.sampled_from([1, 2]))
def test_context_parallel_positions_partition_the_row_evenly(
    shapes: list[tuple[int, int, int]], cp_size: int, tp_size: int
) -> None:
    packed = pack(contexts_of(shapes), PackingRules(max_tokens=256, cp_size=cp_size, tp_size=tp_size, paired=False))
    for m in pad_to_count(packed, len(packed.student) + 1, len(packed.teacher)).student:
        held = [context_parallel_positions(m.cu_seqlens, cp_size, rank) for rank in range(cp_size)]
        assert [h.numel() for h in held] == [packed.seq_length // cp_size] * cp_size
        assert torch.cat(held).sort().values.equal(torch.arange(packed.seq_length))
        for start, end in segments(m):
            # Equal causal work: the positions within a segment have the same sum on every rank.
            inside = [h[(h >= start) & (h < end)] for h in held]
            assert len({(h.numel(), int(h.sum())) for h in inside}) == 1


def test_context_parallel_positions_are_the_zig_zag_of_each_segment() -> None:
    cu_seqlens = torch.tensor([0, 4, 12], dtype=torch.int32)
    assert context_parallel_positions(cu_seqlens, 2, 0).tolist() == [0, 3, 4, 5, 10, 11]
    assert context_parallel_positions(cu_seqlens, 2, 1).tolist() == [1, 2, 6, 7, 8, 9]
    assert context_parallel_positions(cu_seqlens, 1, 0).tolist() == list(range(12))
    with pytest.raises(ValueError, match=r"a multiple of 6"):
        context_parallel_positions(cu_seqlens, 3, 0)


@settings(deadline=None, max_examples=80)
@given(SHAPES, LAYOUTS, st.sampled_from([1, 4, 16, 64]))
def test_a_quantum_rounds_the_length_up_within_the_budget_and_a_longer_row_holds_the_same_contexts(
    shapes: list[tuple[int, int, int]], layout: dict[str, Any], quantum: int
) -> None:
    contexts, rules = contexts_of(shapes), PackingRules(**layout)
    need, multiple = required_seq_length(contexts, rules), required_seq_length([], rules)
    length = required_seq_length(contexts, rules, seq_quantum=quantum)
    capacity = layout["max_tokens"] // multiple * multiple
    assert need <= length <= capacity and length % multiple == 0
    assert not contexts or length == capacity or (length % quantum == 0 and length - need < math.lcm(multiple, quantum))
    shorter, longer = pack(contexts, rules), pack(contexts, rules, seq_length=length)
    assert (shorter.seq_length, longer.seq_length) == (need, length)
    for name in ("student", "teacher"):
        prompts = [getattr(context, f"{name}_prompt") for context in contexts]
        rows = [contexts_by_row(getattr(packed, name), prompts) for packed in (shorter, longer)]
        assert rows[0] == rows[1]


@pytest.mark.parametrize("cp_size", [1, 2])
def test_every_response_token_of_joined_turns_is_predicted_once_by_the_token_before_it(cp_size):
    contexts = turns_of(6)
    packed = pack(contexts, PackingRules(max_tokens=160, cp_size=cp_size, tp_size=1, paired=False, joins_turns=True))
    own = [token for context in contexts for token in context.response]
    assert packed.response_tokens.tolist() == own and packed.num_contexts == 12
    for stream in (packed.student, packed.teacher):
        assert sum(m.num_sequences for m in stream) == 2
        assert sorted(torch.cat([m.response_ids for m in stream]).tolist()) == list(range(len(own)))
        for m in stream:
            assert m.tokens[m.response_positions + 1].tolist() == packed.response_tokens[m.response_ids].tolist()


def test_only_a_context_that_continues_the_one_before_it_in_both_prompts_joins_it():
    rules = PackingRules(max_tokens=200, cp_size=1, tp_size=1, paired=False, joins_turns=True)
    turns = turns_of(3)
    assert segments_of(turns, rules) == [range(3), range(3, 6)]
    assert segments_of(turns, replace(rules, joins_turns=False)) == [range(i, i + 1) for i in range(6)]
    without_second = [turns[0], *turns[2:]]
    assert segments_of(without_second, rules) == [range(2), range(2, 5)], "a left-out turn is part of the prompt"
    other_hint = replace(turns[1], teacher_prompt=[99, *turns[1].teacher_prompt])
    assert segments_of([turns[0], other_hint, turns[2]], rules) == [range(i, i + 1) for i in range(3)]
    assert segments_of([turns[1], turns[0], turns[2]], rules) == [range(1), range(1, 3)]
    assert segments_of([], rules) == []
