# Copyright (c) 2026 the megatron_selfdistill authors. Apache-2.0.
"""The laws of rows: every response token once, one context per row, padding behind it, and states that predict."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from megatron_selfdistill.data.contexts import ContextPair
from megatron_selfdistill.data.packing import PackingRules, pad_to_count
from megatron_selfdistill.data.rows import in_rows, required_row_length, row_count

SHAPES = st.lists(st.tuples(st.integers(1, 9), st.integers(1, 14), st.integers(0, 12)), max_size=9)
RULES = st.builds(
    PackingRules,
    max_tokens=st.sampled_from([40, 130]),
    cp_size=st.just(1),
    tp_size=st.sampled_from([1, 2, 4]),
    paired=st.booleans(),
    seq_multiple=st.sampled_from([None, 6]),
)


def contexts_of(shapes: list[tuple[int, int, int]]) -> list[ContextPair]:
    """Return contexts in which every token is a different number."""
    number = iter(range(1, 10**6))

    def fresh(count: int) -> list[int]:
        return [next(number) for _ in range(count)]

    return [ContextPair(f"p{i}", fresh(s), fresh(t), fresh(r), i % 2 == 0) for i, (s, t, r) in enumerate(shapes)]


@settings(deadline=None, max_examples=150)
@given(SHAPES, RULES, st.sampled_from([None, 16]))
def test_every_batch_obeys_the_laws(shapes, rules, seq_quantum):
    contexts = contexts_of(shapes)
    length = required_row_length(contexts, rules, seq_quantum=seq_quantum)
    count = row_count(len(contexts), length, rules.max_tokens)
    batch = in_rows(contexts, rules, length, count)
    assert length % rules.length_multiple == 0 and length * count == batch.seq_length <= rules.max_tokens
    assert batch.response_tokens.tolist() == [token for context in contexts for token in context.response]
    batch = pad_to_count(batch, len(batch.student) + 1, len(batch.teacher) + 1)
    prompts = [c.student_prompt for c in contexts], [c.teacher_prompt for c in contexts]
    for stream, of_role in zip((batch.student, batch.teacher), prompts, strict=True):
        rows = [row for m in stream for row in m.tokens.view(count, length)]
        for row, prompt, context in zip(rows, of_role, contexts, strict=False):
            text = prompt + context.response
            assert row.tolist() == text + [0] * (length - len(text))
        assert not any(row.any() for row in rows[len(contexts) :])
        assert sum(m.num_sequences for m in stream) == len(contexts) and stream[-1].num_sequences == 0
        assert torch.cat([m.response_ids for m in stream]).tolist() == list(range(len(batch.response_tokens)))
        for m in stream:
            assert m.num_rows == count
            assert torch.equal(m.padding_mask, m.tokens == 0)
            expected = torch.arange(length).repeat(count).masked_fill(m.padding_mask, 0)
            assert torch.equal(m.position_ids, expected)
            # The states [s, b, h], position by position: that of the token before each response token.
            by_state = m.tokens.view(count, length).T.flatten()
            assert torch.equal(by_state[m.state_positions], m.tokens[m.response_positions])
            assert torch.equal(m.tokens[m.response_positions + 1], batch.response_tokens[m.response_ids])


def test_rows_that_fit_into_fewer_microbatches_are_spread_evenly():
    assert row_count(7, 10, 40) == 4  # two microbatches of 4 rows, 7 of the 8 rows in use
    assert row_count(9, 10, 80) == 5  # not one of 8 rows and one of 1
    assert row_count(0, 10, 40) == 1


RULES_OF_16 = PackingRules(max_tokens=16, cp_size=1, tp_size=2, paired=True)


@pytest.mark.parametrize(
    ("shape", "rules", "message"),
    [
        ((3, 5, 12), RULES_OF_16, r"Problem p0: expected contexts of at most 16 tokens, .* got 17; raise max_tokens"),
        ((0, 5, 3), RULES_OF_16, "Problem p0: expected at least one token in each prompt"),
        ((3, 5, 3), PackingRules(16, 2, 1, True), "cp_size: expected 1, since context parallelism cannot cut rows"),
        ((3, 5, 3), PackingRules(1, 1, 2, True), "max_tokens: expected at least 2"),
    ],
)
def test_what_does_not_fit_is_refused(shape, rules, message):
    with pytest.raises(ValueError, match=message):
        required_row_length(contexts_of([shape]), rules)


@pytest.mark.parametrize(("length", "count"), [(6, 1), (9, 1), (10, 2)])
def test_rows_of_a_wrong_shape_are_refused(length, count):
    """Too short, no multiple of TP, too many tokens in all."""
    with pytest.raises(ValueError, match="length, count: expected rows of a multiple of 2 tokens, at least 8"):
        in_rows(contexts_of([(3, 5, 3)]), RULES_OF_16, length, count)
