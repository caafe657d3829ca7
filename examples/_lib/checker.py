# Copyright (c) 2026 the megatron_selfdistill authors. Apache-2.0.
"""An environment for column subtraction: it names the first wrong column of an attempt, once.

    prompt      500-408:
    response    08=8.,00=0.,54=1.;108
    reply       X1                     the first column from the right is wrong: 0 - 8 = 2, and the next column lends
    response    08=2b,00=9b,54=0.;092

``environment.name=_lib.checker.Checker`` with the directory ``examples`` on PYTHONPATH names this environment.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from _lib.subtraction import NUM_DIGITS, verify, work
from megatron_selfdistill.environments import Reply


class Checker:
    """An environment whose episodes end with a right answer, or with the second response."""

    def reply(self, problem: Any, said: Sequence[str]) -> Reply:
        """Return ``X`` and the number of the first wrong column from the right, from 1, as text and as feedback.

        The reward is 1 for a right answer, else 0; a right answer has no feedback.
        """
        attempt = said[-1]
        if verify(attempt, problem):
            return Reply(reward=1.0)
        a, _, b = problem.messages[0]["content"].rstrip(":").partition("-")
        critique = f"X{first_wrong_column(attempt, int(a), int(b))}"
        return Reply(critique, feedback=critique, done=len(said) > 1)


def first_wrong_column(attempt: str, a: int, b: int) -> int:
    """Return the first column of an attempt at a - b that is wrong or missing, counted from 1 at the right.

    Where all columns are right, the result is the first wrong digit of the answer, and 1 where the number of its digits
    is wrong.
    """
    columns, _, answer = attempt.partition(";")
    right_columns, _, right_answer = work(a, b)[:-1].partition(";")
    pairs = list(zip(_padded(columns.split(",")), right_columns.split(","), strict=True))
    if len(answer) == NUM_DIGITS:
        pairs += zip(reversed(answer), reversed(right_answer), strict=True)
    wrong = [i for i, (found, right) in enumerate(pairs) if found != right]
    return wrong[0] % NUM_DIGITS + 1 if wrong else 1


def _padded(columns: list[str]) -> list[str]:
    return (columns + [""] * NUM_DIGITS)[:NUM_DIGITS]
