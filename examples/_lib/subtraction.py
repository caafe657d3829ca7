# Copyright (c) 2026 the megatron_selfdistill authors. Apache-2.0.
"""Three-digit column subtraction as pupils write it, bugs included: the task of the quickstart.

    prompt     500-408:
    response   08=2b,00=9b,54=0.;092$     columns from the right: top, bottom, '=', digit, b(orrow) or '.'; answer; end
    hint       H092|                      the answer alone: no work to imitate

The corpus of the base model subtracts the smaller digit from the larger in a quarter of the borrow columns, and says
0 - N = N in three quarters of those with a zero on top.  Demonstrations that follow a hint are clean.
"""

from __future__ import annotations

import hashlib
import random
from collections.abc import Callable
from typing import Any

NAME = "subtraction"
ALPHABET = "0123456789-=b.,;:|HX~$_"  # '$' ends a text, '_' pads
OVERRIDES: tuple[str, ...] = ()  # configs/quickstart.yaml is written for this task
PRETRAINING: tuple[str, ...] = ()  # what differs from pretraining.py
PRETRAINING_STEPS = 1500
NUM_DIGITS = 3
NUM_HELD_OUT, NUM_TRAINING = 300, 2000

Pair = tuple[int, int]
Record = dict[str, Any]


def held_out_problems() -> list[Record]:
    """The same for every seed; no model, no hint and no corpus has seen them."""
    return [record(a, b) for a, b in distinct(NUM_HELD_OUT, "test", seed=12345)]


def training_problems(seed: int, solution: Callable[[int, int], str] | None = None) -> list[Record]:
    """Problems with hints; ``solution(a, b)`` is the hint, by default the right answer."""
    return [record(a, b, solution) for a, b in distinct(NUM_TRAINING, "train", seed=777 + seed)]


def corpus_row(rng: random.Random) -> tuple[str, str, str]:
    """(prompt, text to read, text to predict): 65 % buggy without a hint, 15 % behind the whole solution as a hint,
    20 % behind the answer alone.  Behind a hint the text to read is a sloppy draft in 60 % of the rows, while the text
    to predict stays clean: a teacher must have seen prefixes that are wrong."""
    a, b = draw(rng, "corpus")
    kind, prompt = rng.random(), problem_text(a, b)
    if kind < 0.65:
        text = work(a, b, rng, bug=0.25, zero_bug=0.75)
        return prompt, text, text
    hint = work(a, b)[:-1] if kind < 0.80 else answer(a, b)
    clean = work(a, b)
    draft = work(a, b, rng, bug=0.4, zero_bug=0.6, slip=0.1) if rng.random() < 0.6 else clean
    return f"{prompt}H{hint}|", draft, clean


def verify(response: str, problem: Any) -> bool:
    """The answer after the one ';' is right (``evaluation.verifier=_lib.subtraction.verify``)."""
    return response.count(";") == 1 and response.partition(";")[2] == problem.answer


def shows_work(response: str) -> bool:
    """All columns are written out before the answer."""
    return ";" in response and response.count(",") == NUM_DIGITS - 1


def record(a: int, b: int, solution: Callable[[int, int], str] | None = None) -> Record:
    """One line of the JSONL that ``data.path`` takes.

    ``as_response`` is the answer in the form of a response without work: what fine-tuning on the hint's text can
    imitate, and what the verifier would accept."""
    right = answer(a, b)
    return {
        "id": f"{a}-{b}",
        "problem": problem_text(a, b),
        "solution": right if solution is None else solution(a, b),
        "answer": right,
        "as_response": f";{right}",
    }


def problem_text(a: int, b: int) -> str:
    return f"{a:0{NUM_DIGITS}d}-{b:0{NUM_DIGITS}d}:"


def answer(a: int, b: int) -> str:
    return f"{a - b:0{NUM_DIGITS}d}"


def with_one_wrong_digit(text: str, rng: random.Random) -> str:
    """``text`` with one of its digits replaced by another."""
    place = rng.choice([i for i, character in enumerate(text) if character.isdigit()])
    other = rng.choice([d for d in "0123456789" if d != text[place]])
    return text[:place] + other + text[place + 1 :]


def work(
    a: int, b: int, rng: random.Random | None = None, bug: float = 0.0, zero_bug: float = 0.0, slip: float = 0.0
) -> str:
    """The columns and the answer.  Shares of the columns that borrow, ``bug``: smaller from larger, ``zero_bug``:
    0 - N = N; of all columns, ``slip``: a random digit."""
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
    """(top, bottom) digits from the right."""
    tops, bottoms = f"{a:0{NUM_DIGITS}d}", f"{b:0{NUM_DIGITS}d}"
    return [(int(top), int(bottom)) for top, bottom in zip(reversed(tops), reversed(bottoms), strict=True)]


def draw(rng: random.Random, split: str) -> Pair:
    """a >= b with at least one borrow and many zeros on top, of ``split`` test, train or corpus."""
    while True:
        top = [0 if rng.random() < 0.25 else rng.randrange(10) for _ in range(NUM_DIGITS)]
        bottom = [rng.randrange(10) for _ in range(NUM_DIGITS)]
        a, b = int("".join(map(str, top))), int("".join(map(str, bottom)))
        if a >= b and any(x < y for x, y in zip(top, bottom, strict=True)) and split_of(a, b) == split:
            return a, b


def distinct(count: int, split: str, seed: int) -> list[Pair]:
    """``count`` different problems of a split."""
    rng, found = random.Random(seed), {}
    while len(found) < count:
        found[draw(rng, split)] = None
    return list(found)


def hard_problems(split: str) -> list[Pair]:
    """Every problem of a split in which two columns must borrow with a zero on top: 300-004, 700-128."""
    pairs = ((a, b) for a in range(100, 10**NUM_DIGITS) if str(a).count("0") >= 2 for b in range(a))
    return [pair for pair in pairs if borrows_from_zero(*pair) >= 2 and split_of(*pair) == split]


def borrows_from_zero(a: int, b: int) -> int:
    """Columns with a zero on top that must borrow."""
    count = borrow = 0
    for top, bottom in columns_of(a, b):
        borrow = int(top - bottom - borrow < 0)
        count += borrow and top == 0
    return count


def split_of(a: int, b: int) -> str:
    """By hash, so that no problem is in two splits: 0 is the test, 1 the problems with hints, the rest the corpus."""
    bucket = int(hashlib.md5(f"{a}-{b}".encode()).hexdigest()[:6], 16) % 10
    return {0: "test", 1: "train"}.get(bucket, "corpus")
