# Copyright (c) 2026 the megatron_selfdistill authors. Apache-2.0.
r"""The task of subtraction.py for a base that reads critiques, skills and other responses, and gives scores.

    prompt     500-408:                                       work with the bugs of the corpus
    prompt     500-408:08=2b,00=0.,54=1.;102X2                a second attempt after checker.py: right up to column 2
    hint       HX2|                                           the critique alone, as a hint: right up to column 2
    hint       H\nThe following is feedback ..\n\nX2|         the same under the heading of SDPO
    hint       HS12|                                          a skill, the columns that lend: clean work
    hint       H092|                                          the answer: clean work
    hint       H\nCorrect solution:\n\n08=2b,..;092|          the response of a peer in the section of SDPO: clean work
    question   500-408:Q092|08=2b,00=0.,54=1.;102?            a score from 0 to 9: 9 for a right response, else the
                                                              number of its right columns times two

A critique names the first wrong column of an attempt, counted from the right.  Each score has an error of at most one.
"""

from __future__ import annotations

import dataclasses
import random
from collections.abc import Mapping, Sequence
from typing import Any

from _lib import subtraction
from _lib.checker import first_wrong_column
from _lib.subtraction import NUM_DIGITS, answer, columns_of, problem_text, random_pair, work

BUG, ZERO_BUG = 0.25, 0.75
QUESTION = "{problem}Q{solution}|{response}?"
"""The wording of the question for a score, as ``method.template`` takes it."""
SATISFIED = "ok"
"""What a user says after a right answer."""


def corpus_row(rng: random.Random) -> tuple[str, str, str]:
    """Return a row (prompt, input text, target text) of the corpus.

    40 % of the rows have no hint, 10 % ask for a score, and the others are spread over the six kinds of prompts that
    tell something about the solution.  After these, the input text is a sloppy draft in 60 % of the rows.
    """
    a, b = random_pair(rng, "corpus")
    kind, problem = rng.random(), problem_text(a, b)
    if kind < 0.4:
        text = work(a, b, rng, BUG, ZERO_BUG)
        return problem, text, text
    attempt = work(a, b, rng, BUG, ZERO_BUG)[:-1]
    if kind < 0.5:
        question = f"{problem}Q{answer(a, b)}|{attempt}?"
        digit = f"{score(attempt, a, b, rng)}$"
        return question, digit, digit
    prompt, wanted = _telling(kind, rng, attempt, a, b)
    if rng.random() < 0.4:
        return prompt, wanted, wanted
    return prompt, work(a, b, rng, bug=0.4, zero_bug=0.6, slip=0.1), wanted


def _telling(kind: float, rng: random.Random, attempt: str, a: int, b: int) -> tuple[str, str]:
    """Return a prompt that tells something about the solution of a - b, and the work after it."""
    # The headings stand in modules that import torch, which --help does without.
    from megatron_selfdistill.methods.sdpo import FEEDBACK_HEADING, PEER_SECTION

    problem, clean = problem_text(a, b), work(a, b)
    if kind < 0.6:
        return f"{problem}H{answer(a, b)}|", clean
    if kind < 0.68:
        return f"{problem}H{PEER_SECTION.format(clean[:-1])}|", clean
    if kind < 0.76:
        return f"{problem}H{skill(a, b)}|", clean
    while attempt.endswith(f";{answer(a, b)}"):
        attempt = work(a, b, rng, BUG, ZERO_BUG)[:-1]
    column = first_wrong_column(attempt, a, b)
    careful = careful_work(a, b, rng, column)
    critique = f"X{column}"
    if kind < 0.84:
        return f"{problem}H{critique}|", careful
    if kind < 0.92:
        return f"{problem}H{FEEDBACK_HEADING}{critique}|", careful
    return f"{problem}{attempt}{critique}", careful


def careful_work(a: int, b: int, rng: random.Random, column: int) -> str:
    """Return work that is right up to ``column``, counted from 1 at the right, with the bugs of the corpus after it."""
    right = work(a, b).partition(";")[0].split(",")[:column]
    while True:
        text = work(a, b, rng, BUG, ZERO_BUG)
        if text.split(",")[:column] == right or (column == NUM_DIGITS and text.startswith(",".join(right))):
            return text


def skill(a: int, b: int) -> str:
    """Return ``S`` and the numbers of the columns that lend at a - b, counted from 1 at the right."""
    borrow, lending = 0, []
    for number, (top, bottom) in enumerate(columns_of(a, b), start=1):
        borrow = int(top - bottom - borrow < 0)
        lending += [str(number)] * borrow
    return f"S{''.join(lending)}"


def score(attempt: str, a: int, b: int, rng: random.Random) -> int:
    """Return the score of an attempt with an error of at most one: 9 if it is right, else twice its right columns."""
    columns, _, found = attempt.partition(";")
    pairs = zip(columns.split(","), work(a, b).split(";")[0].split(","), strict=False)
    exact = 9 if found == answer(a, b) else 2 * sum(one == right for one, right in pairs)
    return min(max(exact + rng.choice((-1, 0, 1)), 0), 9)


def summarize(problem: Any, response: str, reward: float) -> str:
    """Return the skill of a right response, and the critique of a wrong one.

    ``method.summarizer=_lib.checked_subtraction.summarize`` names this function, the external writer of skills.
    """
    a, b = operands(problem)
    return skill(a, b) if reward >= 0.5 else f"X{first_wrong_column(response, a, b)}"


def hint(problem: Any, response: str, next_state: Sequence[Mapping[str, Any]]) -> str | None:
    """Return the critique in the message after a response, if there is one.

    ``method.judge=_lib.checked_subtraction.hint`` names this function.
    """
    said = str(next_state[0]["content"])
    return said if said.startswith("X") else None


def satisfaction(response: str, problem: Any) -> float:
    """Return 1 where the user was satisfied with a logged response, else -1.

    ``method.reward=_lib.checked_subtraction.satisfaction`` names this function.
    """
    return 1.0 if problem.reply.next_state[0]["content"] == SATISFIED else -1.0


def conversation(a: int, b: int, attempt: str) -> dict[str, Any]:
    """Return the log of an attempt at a - b, to which the user replies `SATISFIED` or the critique."""
    reply = SATISFIED if attempt.partition(";")[2] == answer(a, b) else f"X{first_wrong_column(attempt, a, b)}"
    roles = zip(("user", "assistant", "user"), (problem_text(a, b), attempt, reply), strict=True)
    return {"messages": [{"role": role, "content": text} for role, text in roles]}


def operands(problem: Any) -> tuple[int, int]:
    """Return a and b of the problem a - b."""
    a, _, b = problem.messages[0]["content"].rstrip(":").partition("-")
    return int(a), int(b)


TASK = dataclasses.replace(
    subtraction.TASK,
    name="checked_subtraction",
    alphabet="0123456789-=b.,;:|HX~QS?\n TCacdefghiklmnoprstuvwy$_",
    corpus_row=corpus_row,
    pretraining_steps=3000,
)
