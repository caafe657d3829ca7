# Copyright (c) 2026 the megatron_selfdistill authors. Apache-2.0.
"""Three-digit subtraction with a calculator for one column, turn by turn: an environment with a tool, and its task.

    prompt      500-408:
    response    T08.           a call for the column at the right: top, bottom, and no borrow from it
    reply       >2b            the tool: the digit, and b where the next column must lend
    response    T00b           the next column, which lends
    reply       >9b
    response    T54b
    reply       >0.
    response    ;092           the answer, which ends the episode

In the corpus of the base model, a quarter of the calls that must lend forget it, ``T00.`` after ``>2b``, and a quarter
of the calls with the smaller digit on top exchange both digits, ``T80.``, also the first call.  The tool answers what
it is asked, so that every later turn follows a wrong one.

``environment.name=_lib.calculator.Calculator`` with the directory ``examples`` on PYTHONPATH names this environment.
"""

from __future__ import annotations

import dataclasses
import random
import re
from collections.abc import Sequence
from typing import Any

from _lib import subtraction
from _lib.subtraction import NUM_DIGITS, answer, columns_of, problem_text, random_pair
from megatron_selfdistill.environments import Reply

CALL = re.compile(r"T(\d)(\d)([.b])")
SLIPS = 0.25
"""The share of the corpus's calls that forget to lend, among those that must, and that exchange both digits, among
those with the smaller one on top."""


class Calculator:
    """An environment whose tool subtracts one column; the episode ends with any text that is no call."""

    def reply(self, problem: Any, said: Sequence[str]) -> Reply:
        """Return the tool's result for a call; the reward is 1 for the right answer, else 0."""
        call = CALL.fullmatch(said[-1])
        if call is None:
            return Reply(reward=float(said[-1] == f";{problem.answer}"))
        return Reply(result(int(call[1]), int(call[2]), call[3] == "b"), role="tool", done=False)


def result(top: int, bottom: int, lends: bool) -> str:
    """Return the tool's text for a column: ``>``, the digit, and b where the next column must lend, else a point."""
    difference = top - bottom - lends
    return f">{difference % 10}{'b' if difference < 0 else '.'}"


def episode(a: int, b: int, rng: random.Random | None = None, slips: float = 0.0) -> tuple[list[str], list[str]]:
    """Return the responses and the tool's replies at a - b.

    ``slips``: the share of the calls with a mistake, among those that allow it (see `SLIPS`); 0 is right.
    """
    calls, results, lends = [], [], False

    def slipped(possible: bool) -> bool:
        return possible and rng is not None and rng.random() < slips

    for top, bottom in columns_of(a, b):
        if slipped(top < bottom):
            top, bottom = bottom, top
        lends = lends and not slipped(lends)
        calls.append(f"T{top}{bottom}{'b' if lends else '.'}")
        results.append(result(top, bottom, lends))
        lends = results[-1].endswith("b")
    digits = "".join(text[1] for text in reversed(results))
    return [*calls, f";{digits}"], results


def corpus_row(rng: random.Random) -> tuple[str, str, str]:
    """Return a row (prompt, input text, target text) of the corpus: one turn, after the turns before it.

    65 % of the rows have no hint, and their calls slip.  The other rows have the answer as a hint: their last turn does
    what is right after the turns before it, which slip in half of the rows, and the answer is the hint's.
    """
    a, b = random_pair(rng, "corpus")
    prompt, turn = problem_text(a, b), rng.randrange(NUM_DIGITS + 1)
    if rng.random() < 0.65:
        responses, results = episode(a, b, rng, SLIPS)
        text = f"{responses[turn]}$"
        return prompt + history(responses, results, turn), text, text
    responses, results = episode(a, b, rng, SLIPS if rng.random() < 0.5 else 0.0)
    text = f";{answer(a, b)}$"
    if turn < NUM_DIGITS:
        top, bottom = columns_of(a, b)[turn]
        lends = turn > 0 and results[turn - 1].endswith("b")
        text = f"T{top}{bottom}{'b' if lends else '.'}$"
    return f"{prompt}H{answer(a, b)}|" + history(responses, results, turn), text, text


def history(responses: Sequence[str], results: Sequence[str], turn: int) -> str:
    """Return the calls and the replies before a turn, as the prompt shows them."""
    return "".join(call + reply for call, reply in zip(responses[:turn], results[:turn], strict=True))


def verify(response: str, problem: Any) -> bool:
    """Return whether the last response of an episode is the right answer; the environment gives the same verdict."""
    return response == f";{problem.answer}"


TASK = dataclasses.replace(
    subtraction.TASK,
    name="calculator",
    alphabet="0123456789-b.;:|HT>~$_",  # '$' ends a text, '_' pads
    corpus_row=corpus_row,
    shows_work=lambda response: bool(CALL.fullmatch(response)),
    overrides=("rollout.max_new_tokens=8", "evaluation.verifier=_lib.calculator.verify"),
    environment=("environment.name=_lib.calculator.Calculator", f"environment.max_turns={NUM_DIGITS + 1}"),
)
