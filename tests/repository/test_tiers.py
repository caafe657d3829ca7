# Copyright (c) 2026 the megatron_selfdistill authors. Apache-2.0.
"""The cover of `make test` has every pair, and leaves the rest of the combinations to `make test-all`."""

from __future__ import annotations

import itertools

import pytest
from hypothesis import given
from hypothesis import strategies as st
from tiers import combinations, cover_of

AXES = {"layout": ["TP2", "PP2", "CP2", "EP2"], "family": ["llama", "qwen3", "mixtral"], "dtype": ["fp32", "bf16"]}


def pairs(cases):
    return {frozenset(pair) for case in cases for pair in itertools.combinations(enumerate(case), 2)}


def params(mark):
    return mark.args[1]


def is_full(param):
    return any(mark.name == "full" for mark in param.marks)


def test_every_pair_is_covered_by_as_many_cases_as_the_two_longest_axes_have_pairs():
    cases = list(itertools.product(*AXES.values()))
    cover = cover_of(cases, 2)
    assert set(cover) <= set(cases) and pairs(cover) == pairs(cases)
    assert len(cover) == 12 < len(cases) == 24


def test_a_cover_of_single_values_has_each_of_them():
    cover = cover_of(list(itertools.product(*AXES.values())), 1)
    assert {value for case in cover for value in case} == {value for axis in AXES.values() for value in axis}
    assert len(cover) == 4


@given(st.sets(st.tuples(*[st.sampled_from("abc")] * 4)), st.integers(1, 5))
def test_what_occurs_together_in_any_cases_occurs_together_in_their_cover(cases, strength):
    def parts(cases):
        size = min(strength, 4)
        return {frozenset(part) for case in cases for part in itertools.combinations(enumerate(case), size)}

    ordered = sorted("".join(case) for case in cases)
    assert parts(cover_of(ordered, strength)) == parts(ordered)


def test_all_combinations_are_cases_and_those_beyond_the_cover_are_full():
    mark = combinations(**AXES)
    assert mark.args[0] == ("layout", "family", "dtype")
    assert [param.id for param in params(mark)] == ["-".join(case) for case in itertools.product(*AXES.values())]
    assert sum(not is_full(param) for param in params(mark)) == 12


def test_invalid_combinations_are_no_cases_and_other_values_than_the_quick_ones_are_full():
    mark = combinations(
        **AXES,
        quick={"layout": ["TP2", "EP2"]},
        valid=lambda layout, family, dtype: (layout == "EP2") == (family == "mixtral"),
    )
    assert {param.values[:2] for param in params(mark) if not is_full(param)} == {
        ("TP2", "llama"),
        ("TP2", "qwen3"),
        ("EP2", "mixtral"),
    }
    assert {param.values[0] for param in params(mark) if is_full(param)} == {"PP2", "CP2"}


def test_a_mapping_names_its_values():
    mark = combinations(size={"one": 1, "two": 2}, quick={"size": ["one"]}, strength=1)
    assert mark.args[0] == "size"
    assert [(param.id, param.values, is_full(param)) for param in params(mark)] == [
        ("one", (1,), False),
        ("two", (2,), True),
    ]


def test_with_a_strength_of_their_own_the_full_cases_are_those_that_the_cover_of_this_strength_adds():
    mark = combinations(**AXES, strength=1, full_strength=2)
    cases = list(itertools.product(*AXES.values()))
    assert [param.values for param in params(mark) if not is_full(param)] == cover_of(cases, 1)
    assert pairs(param.values for param in params(mark)) == pairs(cases)
    assert len(params(mark)) < len(cases)


def test_a_quick_value_that_the_axis_lacks_is_refused():
    with pytest.raises(ValueError, match=r"expected values of the axis layout, got \['TP3'\]; it has \['TP2'"):
        combinations(**AXES, quick={"layout": ["TP3"]})
