# Copyright (c) 2026 the megatron_selfdistill authors. Apache-2.0.
"""Three-digit column subtraction as pupils write it, with their bugs: the task of the quickstart.

    prompt     500-408:
    response   08=2b,00=9b,54=0.;092$     columns from the right: top, bottom, '=', digit, b(orrow) or '.'; answer; end
    hint       H092|                      the answer alone, without work to imitate

In the corpus of the base model, a quarter of the columns that must borrow subtract the smaller digit from the larger
one; with a zero on top, three quarters of these columns say 0 - N = N.  Demonstrations that follow a hint are clean.
"""

from __future__ import annotations

import hashlib
import random
from collections.abc import Callable
from typing import Any

from _lib.task import Record, Task

NUM_DIGITS = 3
NUM_HELD_OUT, NUM_TRAINING, NUM_HELD_OUT_HARD = 300, 2000, 200

Pair = tuple[int, int]


def held_out_problems() -> list[Record]:
    """Return the held-out problems, which are the same for every seed and appear in no corpus and no training data."""
    return [record(a, b) for a, b in distinct(NUM_HELD_OUT, "test", seed=12345)]


def training_problems(seed: int, solution: Callable[[int, int], str] | None = None) -> list[Record]:
    """Return problems with hints; ``solution(a, b)`` is the hint, by default the right answer."""
    return [record(a, b, solution) for a, b in distinct(NUM_TRAINING, "train", seed=777 + seed)]


def corpus_row(rng: random.Random) -> tuple[str, str, str]:
    """Return a row (prompt, input text, target text) of the corpus.

    65 % of the rows are buggy work without a hint, 15 % have the whole solution as a hint and 20 % have the answer
    alone.  With a hint, the input text is a sloppy draft in 60 % of the rows while the target text stays clean, because
    a teacher must have seen wrong prefixes.
    """
    a, b = random_pair(rng, "corpus")
    kind, prompt = rng.random(), problem_text(a, b)
    if kind < 0.65:
        text = work(a, b, rng, bug=0.25, zero_bug=0.75)
        return prompt, text, text
    hint = work(a, b)[:-1] if kind < 0.80 else answer(a, b)
    clean = work(a, b)
    draft = work(a, b, rng, bug=0.4, zero_bug=0.6, slip=0.1) if rng.random() < 0.6 else clean
    return f"{prompt}H{hint}|", draft, clean


def verify(response: str, problem: Any) -> bool:
    """Return whether the answer after the only ';' is right.

    ``evaluation.verifier=_lib.subtraction.verify`` names this function.
    """
    return response.count(";") == 1 and response.partition(";")[2] == problem.answer


def shows_work(response: str) -> bool:
    """Return whether the response shows all columns before the answer."""
    return ";" in response and response.count(",") == NUM_DIGITS - 1


def record(a: int, b: int, solution: Callable[[int, int], str] | None = None) -> Record:
    """Return one line of the JSONL that ``data.path`` names.

    ``as_response`` is the answer in the form of a response without work: fine-tuning on the text of the hint can
    imitate it, and the verifier accepts it.
    """
    right = answer(a, b)
    return {
        "id": f"{a}-{b}",
        "problem": problem_text(a, b),
        "solution": right if solution is None else solution(a, b),
        "answer": right,
        "as_response": f";{right}",
    }


def problem_text(a: int, b: int) -> str:
    """Return the prompt of a problem."""
    return f"{a:0{NUM_DIGITS}d}-{b:0{NUM_DIGITS}d}:"


def answer(a: int, b: int) -> str:
    """Return the difference with three digits."""
    return f"{a - b:0{NUM_DIGITS}d}"


def with_one_wrong_digit(text: str, rng: random.Random) -> str:
    """Return ``text`` with one digit replaced by a different digit."""
    place = rng.choice([i for i, character in enumerate(text) if character.isdigit()])
    other = rng.choice([d for d in "0123456789" if d != text[place]])
    return text[:place] + other + text[place + 1 :]


def work(
    a: int, b: int, rng: random.Random | None = None, bug: float = 0.0, zero_bug: float = 0.0, slip: float = 0.0
) -> str:
    """Return the columns and the answer, which are right by default.

    ``bug`` is the share of the borrowing columns that subtract the smaller digit from the larger one, ``zero_bug`` is
    the share of the borrowing columns with a zero on top that say 0 - N = N, and ``slip`` is the share of all columns
    with a random digit.
    """
    columns, digits, borrow = [], [], 0
    for top, bottom in columns_of(a, b):
        needs = top - bottom - borrow < 0
        digit, carried = (top - bottom - borrow) % 10, int(needs)
        if rng is not None and needs and rng.random() < (zero_bug if top == 0 else bug):
            digit, carried = abs(top - bottom), 0
        if rng is not None and slip and rng.random() < slip:
            digit = rng.randrange(10)
        columns.append(f"{top}{bottom}={digit}{'b' if carried else '.'}")
        digits.append(str(digit))
        borrow = carried
    return ",".join(columns) + ";" + "".join(reversed(digits)) + "$"


def columns_of(a: int, b: int) -> list[Pair]:
    """Return the (top, bottom) digits of the columns, from the right."""
    tops, bottoms = f"{a:0{NUM_DIGITS}d}", f"{b:0{NUM_DIGITS}d}"
    return [(int(top), int(bottom)) for top, bottom in zip(reversed(tops), reversed(bottoms), strict=True)]


def random_pair(rng: random.Random, split: str) -> Pair:
    """Return a random a >= b with at least one borrow and many zeros on top; ``split``: test, train or corpus."""
    while True:
        top = [0 if rng.random() < 0.25 else rng.randrange(10) for _ in range(NUM_DIGITS)]
        bottom = [rng.randrange(10) for _ in range(NUM_DIGITS)]
        a, b = int("".join(map(str, top))), int("".join(map(str, bottom)))
        if a >= b and any(x < y for x, y in zip(top, bottom, strict=True)) and split_of(a, b) == split:
            return a, b


def distinct(count: int, split: str, seed: int) -> list[Pair]:
    """Return ``count`` different problems of a split."""
    rng = random.Random(seed)
    found: dict[Pair, None] = {}
    while len(found) < count:
        found[random_pair(rng, split)] = None
    return list(found)


def hard_problems(split: str) -> list[Pair]:
    """Return every problem of a split in which two columns must borrow with a zero on top, such as 300-004."""
    pairs = ((a, b) for a in range(100, 10**NUM_DIGITS) if str(a).count("0") >= 2 for b in range(a))
    return [pair for pair in pairs if borrows_from_zero(*pair) >= 2 and split_of(*pair) == split]


def hard_training_problems() -> list[Record]:
    """Return all hard problems of the training split."""
    return [record(*pair) for pair in hard_problems("train")]


def hard_held_out_problems() -> list[Record]:
    """Return a sample of the hard problems of the test split."""
    return [record(*pair) for pair in random.Random(12345).sample(hard_problems("test"), NUM_HELD_OUT_HARD)]


def borrows_from_zero(a: int, b: int) -> int:
    """Return the number of columns with a zero on top that must borrow."""
    count = borrow = 0
    for top, bottom in columns_of(a, b):
        borrow = int(top - bottom - borrow < 0)
        count += borrow and top == 0
    return count


def split_of(a: int, b: int) -> str:
    """Return the split of a problem, which depends on its hash alone, so that the splits share no problem."""
    bucket = int(hashlib.md5(f"{a}-{b}".encode()).hexdigest()[:6], 16) % 10
    return {0: "test", 1: "train"}.get(bucket, "corpus")


TASK = Task(
    "subtraction",
    alphabet="0123456789-=b.,;:|HX~$_",  # '$' ends a text, '_' pads
    corpus_row=corpus_row,
    training_problems=training_problems,
    held_out_problems=held_out_problems,
    shows_work=shows_work,
)
