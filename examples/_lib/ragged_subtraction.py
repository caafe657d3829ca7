# Copyright (c) 2026 the megatron_selfdistill authors. Apache-2.0.
"""Column subtraction of numbers with two to four digits: prompts, hints and responses have every length.

    prompt     h5t0u0-t4u8:                          each digit follows the name of its place; no leading zeros
    response   u08=2b,t04=5b,h5=4.;h4t5u2$           a column shows a lower digit only if there is one
    hint       Hh4t5u2|                              the answer alone, or
               Hu08=2b,t04=5b,h5=4.;h4t5u2|          the whole work

Distances in the text vary, so a model must find each digit by the name of its place.  The pupils' bugs are those of
subtraction.py.
"""

from __future__ import annotations

import random
from typing import Any

from _lib.subtraction import Pair, split_of
from _lib.task import Record, Task

PLACES = "uthk"
NUM_HELD_OUT, NUM_TRAINING = 300, 2000


def held_out_problems() -> list[Record]:
    """Return the held-out problems, which are the same for every seed; long and short hints alternate."""
    return _records(NUM_HELD_OUT, "test", seed=12345)


def training_problems(seed: int) -> list[Record]:
    """Return problems; the hint is the whole work in one half of them and the answer alone in the other half."""
    return _records(NUM_TRAINING, "train", seed=777 + seed)


def corpus_row(rng: random.Random) -> tuple[str, str, str]:
    """Return a row (prompt, input text, target text) of the corpus, with the shares of subtraction.py."""
    a, b = random_pair(rng, "corpus")
    kind, prompt = rng.random(), problem_text(a, b)
    if kind < 0.65:
        text = work(a, b, rng, bug=0.25, zero_bug=0.75)
        return prompt, text, text
    clean = work(a, b)
    hint = clean[:-1] if kind < 0.80 else answer(a, b)
    draft = work(a, b, rng, bug=0.4, zero_bug=0.6, slip=0.1) if rng.random() < 0.6 else clean
    return f"{prompt}H{hint}|", draft, clean


def verify(response: str, problem: Any) -> bool:
    """Return whether the answer after the only ';' is right.

    ``evaluation.verifier=_lib.ragged_subtraction.verify`` names this function.
    """
    return response.count(";") == 1 and response.partition(";")[2] == problem.answer


def shows_work(response: str) -> bool:
    """Return whether the response shows a column for every digit of the answer."""
    columns, _, result = response.partition(";")
    return bool(columns) and 2 * (columns.count(",") + 1) == len(result)


def problem_text(a: int, b: int) -> str:
    """Return the prompt of a problem."""
    return f"{with_places(str(a))}-{with_places(str(b))}:"


def answer(a: int, b: int) -> str:
    """Return the difference with as many digits as the upper number."""
    return with_places(f"{a - b:0{len(str(a))}d}")


def with_places(digits: str) -> str:
    """Return the digits with the names of their places: ``h5t0u0`` for ``500``."""
    return "".join(PLACES[len(digits) - 1 - i] + digit for i, digit in enumerate(digits))


def work(
    a: int, b: int, rng: random.Random | None = None, bug: float = 0.0, zero_bug: float = 0.0, slip: float = 0.0
) -> str:
    """Return the columns and the answer; ``bug``, ``zero_bug`` and ``slip`` have the meaning of subtraction.py."""
    columns, digits, borrow = [], "", 0
    lower = str(b)[::-1]
    for place, upper in enumerate(str(a)[::-1]):
        shown = lower[place] if place < len(lower) else ""
        top, bottom = int(upper), int(shown or 0)
        needs = top - bottom - borrow < 0
        digit, carried = (top - bottom - borrow) % 10, int(needs)
        if rng is not None and needs and rng.random() < (zero_bug if top == 0 else bug):
            digit, carried = abs(top - bottom), 0
        if rng is not None and slip and rng.random() < slip:
            digit = rng.randrange(10)
        columns.append(f"{PLACES[place]}{upper}{shown}={digit}{'b' if carried else '.'}")
        digits = f"{digit}{digits}"
        borrow = carried
    return f"{','.join(columns)};{with_places(digits)}$"


def random_pair(rng: random.Random, split: str) -> Pair:
    """Return a random a > b with at least one borrow and many zeros on top.

    ``a`` has two to four digits, and ``b`` has one to as many digits as ``a``.  ``split``: test, train or corpus.
    """
    while True:
        width = rng.randint(2, 4)
        lower_width = rng.randint(1, width)
        top = [rng.randrange(1, 10)] + [0 if rng.random() < 0.25 else rng.randrange(10) for _ in range(width - 1)]
        bottom = [rng.randrange(1, 10)] + [rng.randrange(10) for _ in range(lower_width - 1)]
        a, b = int("".join(map(str, top))), int("".join(map(str, bottom)))
        borrows = any(x < y for x, y in zip(reversed(top), reversed(bottom), strict=False))
        if a > b and borrows and split_of(a, b) == split:
            return a, b


def _records(count: int, split: str, seed: int) -> list[Record]:
    rng = random.Random(seed)
    pairs: dict[Pair, None] = {}
    while len(pairs) < count:
        pairs[random_pair(rng, split)] = None
    return [
        {
            "id": f"{a}-{b}",
            "problem": problem_text(a, b),
            "solution": work(a, b)[:-1] if number % 2 else answer(a, b),
            "answer": answer(a, b),
            "as_response": f";{answer(a, b)}",
        }
        for number, (a, b) in enumerate(pairs)
    ]


TASK = Task(
    "ragged_subtraction",
    alphabet="0123456789-=b.,;:|Huthk$_",  # '$' ends a text, '_' pads
    corpus_row=corpus_row,
    training_problems=training_problems,
    held_out_problems=held_out_problems,
    shows_work=shows_work,
    overrides=("rollout.max_new_tokens=44", "evaluation.verifier=_lib.ragged_subtraction.verify"),
    pretraining_steps=1200,
)
