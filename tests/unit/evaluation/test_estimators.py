# Copyright (c) 2026 the megatron_selfdistill authors. Apache-2.0.
"""Diversity: different right answers, different 4-grams, and how much more several samples solve than one."""

from __future__ import annotations

import itertools
import math
import re
from fractions import Fraction

import pytest
from hypothesis import given
from hypothesis import strategies as st

from megatron_selfdistill.config.schema.run_config import EvaluationConfig
from megatron_selfdistill.evaluation.estimators import (
    Calibration,
    Confidence,
    calibration,
    distinct_grams,
    distinct_right,
    split_confidence,
)


def test_only_right_answers_count_and_white_space_does_not():
    answers = ["10 + 4", "10  + 4\n", "9+5", "7+7", "7+6"]
    assert distinct_right(answers, [True, True, True, True, False]) == 3
    assert distinct_right(answers, [False] * 5) == distinct_right([], []) == 0


@pytest.mark.full
@given(st.lists(st.lists(st.integers(0, 2), max_size=12), max_size=5))
def test_distinct_4_equals_its_definition(responses):
    found = [tuple(tokens[i : i + 4]) for tokens in responses for i in range(len(tokens) - 3)]
    pairs = itertools.combinations(range(len(found)), 2)
    num_repeated = len({j for i, j in pairs if found[i] == found[j]})
    expected = (len(found) - num_repeated) / len(found) if found else None
    assert distinct_grams(responses) == expected


DEFAULT = EvaluationConfig().confidence_pattern


def by_enumeration(values: list[Fraction], right: list[bool]) -> dict[str, Fraction | None]:
    """Return ECE, Brier, SPR and OCG of exact confidences by the definitions, bin by bin and pair by pair."""
    n, ece = len(values), Fraction(0)
    for i in range(10):
        own = [j for j in range(n) if i <= 10 * values[j] < i + 1 or (i == 9 and values[j] == 1)]
        if own:
            gap = sum((values[j] for j in own), Fraction(0)) / len(own) - Fraction(sum(right[j] for j in own), len(own))
            ece += Fraction(len(own), n) * abs(gap)
    pairs = [values[i] > values[j] for i in range(n) for j in range(n) if right[i] and not right[j]]
    return {
        "ece": ece,
        "brier": sum(((c - int(r)) ** 2 for c, r in zip(values, right, strict=True)), Fraction(0)) / n,
        "spr": Fraction(sum(pairs), len(pairs)) if pairs else None,
        "ocg": sum(values, Fraction(0)) / n - Fraction(sum(right), n),
    }


@given(st.lists(st.tuples(st.integers(0, 100), st.booleans()), min_size=1, max_size=30))
def test_every_number_equals_its_definition(responses):
    """Hundredths lie on the edges of the bins, too, and many of them are equal."""
    values, right = [Fraction(hundredth, 100) for hundredth, _ in responses], [it for _, it in responses]
    found = calibration([Confidence.stated(float(value)) for value in values], right)
    assert found is not None
    for name, expected in by_enumeration(values, right).items():
        number = getattr(found, name)
        assert number is None if expected is None else number == pytest.approx(float(expected), abs=1e-14), name


def test_long_responses_are_ordered_although_their_probabilities_are_0():
    better, worse = (Confidence.of_log_probs([-0.5] * length) for length in (2000, 2001))
    assert better.value == worse.value == 0
    assert calibration([better, worse], [True, False]).spr == 1
    assert calibration([better, worse], [False, True]).spr == 0


def test_an_unknown_confidence_gives_no_numbers_and_a_probability_that_rounding_lifts_above_1_is_1():
    known, unknown = Confidence.of_log_probs([-0.5, -0.25]), Confidence.of_log_probs([-0.5, math.nan])
    assert known == Confidence(math.exp(-0.75), -0.75, False)
    assert calibration([known, unknown], [True, False]) is calibration([], []) is None
    assert Confidence.of_log_probs([1e-9, 0.0]) == Confidence(1.0, 0.0, False)


def test_stated_and_other_confidences_are_counted_together():
    found = calibration([Confidence.stated(0.0), Confidence.of_log_probs([math.log(0.5)])], [False, True])
    assert found == Calibration(ece=0.25, brier=0.125, spr=1.0, ocg=-0.25, stated_confidence=0.5)


@pytest.mark.parametrize(
    ("text", "value", "rest"),
    [
        ("12 * 12 = 144\nConfidence: 0.85", 0.85, "12 * 12 = 144\n"),
        ("144\n**Confidence:** 1.", 1.0, "144\n**."),
        ("144 (confidence : .5)", 0.5, "144 ()"),
        ("CONFIDENCE:1.00\n144", 1.0, "\n144"),
        ("Confidence: 0.2. No: confidence: 0.7.\n144", 0.7, ". No: .\n144"),
    ],
)
def test_the_default_pattern_reads_a_number_between_0_and_1(text, value, rest):
    assert split_confidence(text, DEFAULT) == (value, rest)
    for none in ("Confidence: 95%", "Confidence: 0.95 %", "Confidence: 1.5", "Confidence: 10", "Confidence: high"):
        assert split_confidence(none, DEFAULT) == (None, none)
    for none in ("144, overconfidence: 0.5", ""):
        assert split_confidence(none, DEFAULT) == (None, none)


def test_a_pattern_of_ones_own_may_capture_what_is_no_number():
    pattern = re.compile(r"\[(\w*)(?:\.\w+)?\]?")
    assert split_confidence("7 [sure] [1]", pattern) == (1.0, "7 [sure] ")
    assert split_confidence("7 [sure]", pattern) == (None, "7 [sure]")
    assert split_confidence("7 [nan]", re.compile(r"\[(nan)\]")) == (None, "7 [nan]")
    assert split_confidence("7 [1]", None) == (None, "7 [1]")
