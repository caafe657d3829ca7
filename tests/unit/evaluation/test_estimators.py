# Copyright (c) 2026 the megatron_selfdistill authors. Apache-2.0.
"""Diversity: different right answers, different 4-grams, and how much more several samples solve than one."""

from __future__ import annotations

import itertools

from hypothesis import given
from hypothesis import strategies as st

from megatron_selfdistill.evaluation.estimators import distinct_grams, distinct_right


def test_only_right_answers_count_and_white_space_does_not():
    answers = ["10 + 4", "10  + 4\n", "9+5", "7+7", "7+6"]
    assert distinct_right(answers, [True, True, True, True, False]) == 3
    assert distinct_right(answers, [False] * 5) == distinct_right([], []) == 0


@given(st.lists(st.lists(st.integers(0, 2), max_size=12), max_size=5))
def test_distinct_4_equals_its_definition(responses):
    found = [tuple(tokens[i : i + 4]) for tokens in responses for i in range(len(tokens) - 3)]
    pairs = itertools.combinations(range(len(found)), 2)
    num_repeated = len({j for i, j in pairs if found[i] == found[j]})
    expected = (len(found) - num_repeated) / len(found) if found else None
    assert distinct_grams(responses) == expected
