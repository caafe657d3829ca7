# Copyright (c) 2026 the megatron_selfdistill authors. Apache-2.0.
"""A figure passes within its bound only, and over ranks the worst figure counts."""

from __future__ import annotations

import math

import pytest

from tests.gpu.outcome import Figure, Outcome, largest, lines, over_ranks


@pytest.mark.parametrize(
    ("figure", "passes"),
    [
        (Figure("", 1.0, 1.0), True),
        (Figure("", 1.1, 1.0), False),
        (Figure("", math.nan, 1.0), False),
        (Figure("", None, 1.0), False),
        (Figure("", 1.0, 1.0, at_least=True), True),
        (Figure("", 0.9, 1.0, at_least=True), False),
        (Figure("", math.nan, 1.0, at_least=True), False),
    ],
)
def test_a_figure_passes_within_its_bound_only_and_never_unmeasured(figure, passes):
    assert figure.passed is passes
    assert Outcome((figure,)).passed is passes


def test_over_ranks_the_worst_figure_counts_and_nan_is_the_worst():
    def outcome(upper: float | None, lower: float | None, seconds: float = 0.0) -> Outcome:
        return Outcome((Figure("up", upper, 1.0), Figure("low", lower, 1.0, at_least=True)), seconds=seconds)

    joined = over_ranks([outcome(0.1, 3.0), outcome(None, 2.0, 7.0), outcome(0.4, None)])
    assert [figure.value for figure in joined.figures] == [0.4, 2.0] and joined.seconds == 7.0
    joined = over_ranks([outcome(0.1, 3.0), outcome(math.nan, math.nan)])
    assert not any(figure.passed for figure in joined.figures)
    assert over_ranks([outcome(None, None)] * 2).figures[0].value is None
    assert math.isnan(largest("", {"a": 2.0, "b": math.nan, "c": 3.0}, 1.0).value)


def test_ranks_that_disagree_about_what_can_be_done_have_failed():
    joined = over_ranks([Outcome((Figure("a", 0.0, 1.0),)), Outcome(not_done="no Transformer Engine here")])
    assert not joined.passed and "rank 1: no Transformer Engine here" in joined.error


def test_a_check_without_figures_has_not_passed():
    assert not Outcome().passed
    assert Outcome(not_done="no GPU").passed and Outcome(not_done="no GPU").verdict == "not done"


def test_a_figure_out_of_bounds_says_in_which_case():
    (_, row) = lines(Outcome((largest("loss", {"reverse KL": 1e-9, "forward KL": 0.3}, 1e-5),)))
    assert row.endswith("FAILURE (forward KL)")
