# Copyright (c) 2026 the megatron_selfdistill authors. Apache-2.0.
"""Subtraction for a base that thinks: it tries, checks, and tries again, with up to three attempts in one response.

    prompt     500-408:
    response   08=2b,00=0.,54=1.;102?X08=2b,00=9b,54=0.;092?=$
    hint       H092|

An attempt is the work and answer of subtraction.py.  After an attempt the response ends ('$') or checks ('?'), and a
check ends it ('=$') or rejects the attempt ('X').  Without a hint, four fifths of the attempts are checked, a check is
right in 90 % of cases, and a quarter of the columns that must borrow have a bug, or half of them with a zero on top.
With a hint, a fifth of the attempts is checked, because the writer knows the answer; every check is right and there are
no bugs.  With or without a hint, a column has a random digit in 6 % of cases: these slips are what checks are for, also
after the bugs have gone.
"""

from __future__ import annotations

import dataclasses
import random
from collections.abc import Sequence
from statistics import mean
from typing import Any

from _lib import subtraction
from _lib.subtraction import NUM_DIGITS, answer, problem_text, random_pair, work

MAX_ATTEMPTS = 3
LENGTH_OF_ATTEMPT = 23
"""Tokens of an attempt with its check."""
SLIP = 0.06


def corpus_row(rng: random.Random) -> tuple[str, str, str]:
    """Return a row (prompt, input text, target text) of the corpus; 60 % of the rows have no hint.

    With a hint, the input text begins with a sloppy attempt in 60 % of the rows, which the target text does not repeat.
    """
    a, b = random_pair(rng, "corpus")
    if rng.random() < 0.6:
        text = thought(a, b, rng, bug=0.25, zero_bug=0.5, checked=0.8, found=0.9)
        return problem_text(a, b), text, text
    hinted = f"{problem_text(a, b)}H{answer(a, b)}|"
    if rng.random() < 0.6:
        return hinted, *rejected(a, b, rng)
    text = thought(a, b, rng, bug=0.0, zero_bug=0.0, checked=0.2, found=1.0)
    return hinted, text, text


def thought(a: int, b: int, rng: random.Random, *, bug: float, zero_bug: float, checked: float, found: float) -> str:
    """Return up to `MAX_ATTEMPTS` attempts; ``found`` is the probability with which a check is right."""
    text = ""
    for number in range(MAX_ATTEMPTS):
        attempt = work(a, b, rng, bug=bug, zero_bug=zero_bug, slip=SLIP)[:-1]
        text += attempt
        if rng.random() >= checked:
            return text + "$"
        accepted = is_right(attempt, answer(a, b)) == (rng.random() < found)
        if accepted or number + 1 == MAX_ATTEMPTS:
            return text + "?=$"
        text += "?X"
    raise AssertionError("unreachable")


def rejected(a: int, b: int, rng: random.Random) -> tuple[str, str]:
    """Return (input text, target text) after a hint: a sloppy attempt, and a second one if the first one is wrong.

    The targets of both attempts have no bugs, and slips of their own.
    """
    draft = work(a, b, rng, bug=0.4, zero_bug=0.6, slip=0.1)[:-1]
    if is_right(draft, answer(a, b)):
        text = draft + ("?=$" if rng.random() < 0.2 else "$")
        return text, text
    first, second = (work(a, b, rng, slip=SLIP) for _ in range(2))
    return f"{draft}?X{second}", f"{first[:-1]}?X{second}"


def attempts(response: str) -> list[str]:
    """Return the attempts of a response, without checks."""
    return [attempt.partition("?")[0] for attempt in response.split("X")]


def is_right(attempt: str, right: str) -> bool:
    """Return whether the answer after the only ';' of an attempt is ``right``."""
    return attempt.count(";") == 1 and attempt.partition(";")[2] == right


def verify(response: str, problem: Any) -> bool:
    """Return whether the last attempt is right; ``evaluation.verifier`` names this function."""
    return is_right(attempts(response)[-1], problem.answer)


def shows_work(response: str) -> bool:
    """Return whether every attempt shows all columns before its answer."""
    return all(";" in attempt and attempt.count(",") == NUM_DIGITS - 1 for attempt in attempts(response))


def figures(responses: Sequence[tuple[str, str]]) -> dict[str, float]:
    """Return the figures of pairs (right answer, response) that show what remains of thinking.

    attempts: attempts per response; checked: share of the attempts that are checked; within_1, within_2, within_3:
    accuracy of a reader whose budget allows so many attempts, and who takes the last attempt within the budget.
    """
    tried = [(right, attempts(response)) for right, response in responses]
    found = {
        "attempts": mean(len(of_response) for _, of_response in tried),
        "checked": sum(response.count("?") for _, response in responses) / sum(len(made) for _, made in tried),
    }
    for budget in range(1, MAX_ATTEMPTS + 1):
        found[f"within_{budget}"] = mean(is_right(made[:budget][-1], right) for right, made in tried)
    return found


TASK = dataclasses.replace(
    subtraction.TASK,
    name="thinking_subtraction",
    alphabet="0123456789-=b.,;:|HX?$_",
    corpus_row=corpus_row,
    shows_work=shows_work,
    overrides=(
        f"rollout.max_new_tokens={MAX_ATTEMPTS * LENGTH_OF_ATTEMPT + 2}",
        "evaluation.verifier=_lib.thinking_subtraction.verify",
    ),
    pretraining_steps=3000,
)
