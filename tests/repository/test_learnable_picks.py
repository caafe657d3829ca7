# Copyright (c) 2026 the megatron_selfdistill authors. Apache-2.0.
"""The table of the rules for own solutions: which responses compete, which one each rule keeps, and its figures."""

from __future__ import annotations

from pathlib import Path

import pytest
from scripts import load_script

from megatron_selfdistill.pipeline.score import Scores

TOOL = load_script(Path(__file__).resolve().parents[2] / "tools" / "benchmarks" / "learnable_picks.py")
FIRST, SECOND = "A" * 15 + "y", "B" * 15 + "n" + "A" * 15 + "y"


def response(problem: str, text: str, log_prob: float, kl: float, log_ratio: float):
    return TOOL.RightResponse(problem, text, len(text), Scores(log_prob, log_prob, kl, kl), log_ratio, log_ratio)


@pytest.fixture
def groups() -> list[list]:
    """Return two problems: at the first the second attempt is more likely, and its log-ratio is far below 0."""
    return TOOL.several_texts(
        [
            response("p", FIRST, -0.4, 0.1, 0.0),
            response("p", SECOND, -0.2, 0.4, -3.0),
            response("p", FIRST, -9.0, 9.0, -9.0),
            response("alone", FIRST, -0.1, 0.1, 0.1),
            response("alone", FIRST, -0.1, 0.1, 0.1),
            response("q", SECOND, -0.3, 0.2, 0.5),
            response("q", FIRST, -0.4, 0.1, 0.0),
        ]
    )


def test_different_texts_of_one_problem_compete_and_each_counts_once(groups):
    assert [[(r.problem_id, r.text) for r in group] for group in groups] == [
        [("p", FIRST), ("p", SECOND)],
        [("q", SECOND), ("q", FIRST)],
    ]


def test_each_rule_keeps_its_best_response(groups):
    kept = {name: [response.text for response in chosen] for name, chosen in TOOL.picks(groups).items()}
    assert kept["shortest"] == [FIRST, FIRST]
    assert kept["most_likely"] == [SECOND, SECOND]
    assert kept["log-ratio"] == [SECOND, FIRST]
    assert kept["learnable, ratio_weight 1"] == [FIRST, SECOND]
    assert kept["learnable, ratio_weight 3"] == [FIRST, FIRST]


def test_the_table_has_a_number_per_seed(groups):
    first, second = TOOL.picks(groups[:1]), TOOL.picks(groups[1:])
    _, _, *rows = TOOL.table({name: [first[name], second[name]] for name in TOOL.RULES})
    assert "| shortest | 1.00, 1.00 | 1.00, 1.00 | -0.400, -0.400 | 0.100, 0.100 |" in rows
    assert "| most_likely | 2.00, 2.00 | 0.00, 0.00 | -0.200, -0.300 | 0.400, 0.200 |" in rows
    assert len(rows) == len(TOOL.RULES)
