# Copyright (c) 2026 the megatron_selfdistill authors. Apache-2.0.
"""Two numbers that add up to a given one: a task with many right answers.

    prompt     57:
    response   12;45$       any two numbers from 00 that add up to 57
    hint       H31;26|      one right answer of the 58

The corpus of the base model samples uniformly among all right answers.  In half of the demonstrations without a hint, a
digit of the second number is off by one.  Demonstrations with a hint are right, and only 30 % of them copy the hint,
because a teacher that copies its hint teaches a single answer.
"""

from __future__ import annotations

import random
from typing import Any

from _lib.task import Record, Task

WEAK_PRETRAINING_STEPS = 1500
SUMS = range(10, 100)
NUM_TRAINING = 2000


def held_out_problems() -> list[Record]:
    """Return the sums divisible by 3, once each; neither the corpus nor the training problems contain these sums."""
    rng = random.Random(12345)
    return [record(total, total - total % 3, rng) for total in SUMS if is_held_out(total)]


def training_problems(seed: int) -> list[Record]:
    """Return problems with one right answer as the hint; most sums come often, with different hints."""
    rng = random.Random(777 + seed)
    return [record(random_total(rng), number, rng) for number in range(NUM_TRAINING)]


def corpus_row(rng: random.Random) -> tuple[str, str, str]:
    """Return a row (prompt, input text, target text) of the corpus.

    Half of the rows have no hint, and half of the rows without a hint are wrong.  The other rows have a hint and are
    right; 30 % of them copy the hint.
    """
    total = random_total(rng)
    right = some_answer(total, rng)
    if rng.random() < 0.5:
        text = (off_by_one(right, rng) if rng.random() < 0.5 else right) + "$"
        return f"{total:02d}:", text, text
    hint = right if rng.random() < 0.3 else some_answer(total, rng)
    return f"{total:02d}:H{hint}|", right + "$", right + "$"


def verify(response: str, problem: Any) -> bool:
    """Return whether the two numbers add up; ``evaluation.verifier=_lib.additions.verify`` names this function."""
    return is_right(response, int(problem.answer))


def is_right(response: str, total: int) -> bool:
    """Return whether ``response`` consists of two numbers of two digits that add up to ``total``."""
    first, _, second = response.partition(";")
    two_digits = all(len(number) == 2 and number.isdigit() for number in (first, second))
    return two_digits and int(first) + int(second) == total


def shows_work(response: str) -> bool:
    """Return whether the response has the form of two numbers; this task has no other work to show."""
    return len(response) == 5 and response[2] == ";"


def record(total: int, number: int, rng: random.Random) -> Record:
    """Return one line of the JSONL that ``data.path`` names; its solution is one right answer."""
    solution = some_answer(total, rng)
    identity = f"{total}={solution}/{number}"
    return {"id": identity, "problem": f"{total:02d}:", "solution": solution, "answer": str(total)}


def some_answer(total: int, rng: random.Random) -> str:
    """Return a right answer, uniformly among all right answers."""
    first = rng.randint(0, total)
    return f"{first:02d};{total - first:02d}"


def off_by_one(text: str, rng: random.Random) -> str:
    """Return ``text`` with one digit of its second number changed by one (9 and 0 are neighbours)."""
    place = rng.choice([3, 4])
    digit = (int(text[place]) + rng.choice([-1, 1])) % 10
    return f"{text[:place]}{digit}{text[place + 1 :]}"


def random_total(rng: random.Random) -> int:
    """Return a random sum that is not held out."""
    while True:
        total = rng.choice(SUMS)
        if not is_held_out(total):
            return total


def is_held_out(total: int) -> bool:
    """Return whether neither corpus nor training may contain the sum ``total``."""
    return total % 3 == 0


TASK = Task(
    "additions",
    alphabet="0123456789;:|H$_",  # '$' ends a text, '_' pads
    corpus_row=corpus_row,
    training_problems=training_problems,
    held_out_problems=held_out_problems,
    shows_work=shows_work,
    overrides=("rollout.max_new_tokens=8", "evaluation.verifier=_lib.additions.verify"),
    pretraining=("optimizer.lr=3e-3", "optimizer.min_lr=1.5e-4"),
    pretraining_steps=5000,
)
