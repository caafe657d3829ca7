# Copyright (c) 2026 the megatron_selfdistill authors. Apache-2.0.
"""The environment of the example: which column it names, when it ends, and the same replies from a server."""

from __future__ import annotations

import pytest

from _lib.checker import Checker, first_wrong_column
from megatron_selfdistill.data.episode_reply import Reply
from megatron_selfdistill.data.problems import Problem

PROBLEM = Problem("500-408", ({"role": "user", "content": "500-408:"},), "", "092", "file:1")
RIGHT = "08=2b,00=9b,54=0.;092"


@pytest.mark.parametrize(
    ("attempt", "column"),
    [
        ("08=8.,00=0.,54=1.;108", 1),
        ("08=2b,00=0.,54=1.;102", 2),
        ("08=2b,00=9b,54=1.;192", 3),
        ("08=2b,00=9b", 3),
        ("08=2b,00=9b,54=0.;093", 1),
        ("08=2b,00=9b,54=0.;082", 2),
        ("08=2b,00=9b,54=0.;92", 1),
        ("08=2b,00=9b,54=0.", 1),
        ("", 1),
    ],
)
def test_the_first_wrong_column_is_counted_from_the_right(attempt, column):
    assert first_wrong_column(attempt, 500, 408) == column
    assert Checker().reply(PROBLEM, [attempt]) == Reply(f"X{column}", "user", f"X{column}", 0.0, done=False)


def test_an_episode_ends_with_a_right_answer_or_with_the_second_response():
    assert Checker().reply(PROBLEM, [RIGHT]) == Reply(None, "user", None, 1.0, done=True)
    second = Checker().reply(PROBLEM, ["", "X1", "08=2b"])
    assert second.done and second.text == "X2" and second.reward == 0.0
    assert Checker().reply(PROBLEM, ["", "X1", RIGHT]).reward == 1.0
