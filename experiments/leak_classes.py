# Copyright (c) 2026 the megatron_selfdistill authors. Apache-2.0.
"""The task of leaking_subtraction.py with classes of problems: the prompt names how often the base leaks.

    prompt     500-408CQ:      C: 10 % of the demonstrations without a hint show no work; Q: 70 % of those with a hint
    response   08=2b,00=9b,54=0.;092$
    hint       ~092|

One base and one run hold all pairs of both shares, because the model can tell the classes apart by their prompts.
"""

from __future__ import annotations

import dataclasses
import random

from _lib import leaking_subtraction, subtraction
from _lib.leaking_subtraction import hinted_work, homework
from _lib.subtraction import answer, random_pair
from _lib.task import Record

OWN_LEAKS = {"A": 0.01, "B": 0.03, "C": 0.10, "D": 0.30}
"""Mark in the prompt -> share of the demonstrations without a hint that show no work."""
HINT_LEAKS = {"P": 0.50, "Q": 0.70, "R": 0.90, "S": 0.99}
"""Mark in the prompt -> share of the demonstrations with a hint that show no work."""
CLASSES = tuple(own + hint for own in OWN_LEAKS for hint in HINT_LEAKS)
NUM_HELD_OUT = 25
"""Held-out problems of each class."""


def held_out_problems() -> list[Record]:
    """Return the held-out problems, `NUM_HELD_OUT` of each class."""
    pairs = subtraction.distinct(NUM_HELD_OUT * len(CLASSES), "test", seed=12345)
    return [record(a, b, CLASSES[number % len(CLASSES)]) for number, (a, b) in enumerate(pairs)]


def training_problems(seed: int) -> list[Record]:
    """Return the training problems of subtraction.py, each with a random class."""
    rng = random.Random(seed)
    pairs = subtraction.distinct(subtraction.NUM_TRAINING, "train", seed=777 + seed)
    return [record(a, b, rng.choice(CLASSES)) for a, b in pairs]


def corpus_row(rng: random.Random) -> tuple[str, str, str]:
    """Return a row (prompt, input text, target text) of the corpus; 62 % of the rows have no hint."""
    a, b = random_pair(rng, "corpus")
    of_class = rng.choice(CLASSES)
    prompt = problem_text(a, b, of_class)
    if rng.random() < 0.62:
        text = homework(a, b, rng, OWN_LEAKS[of_class[0]])
        return prompt, text, text
    draft, clean = hinted_work(a, b, rng, HINT_LEAKS[of_class[1]])
    return f"{prompt}~{answer(a, b)}|", draft, clean


def problem_text(a: int, b: int, of_class: str) -> str:
    """Return the prompt of a problem of a class."""
    return f"{subtraction.problem_text(a, b)[:-1]}{of_class}:"


def record(a: int, b: int, of_class: str) -> Record:
    """Return one line of the JSONL that ``data.path`` names; its id ends with the class."""
    problem = problem_text(a, b, of_class)
    return {"id": f"{a}-{b}-{of_class}", "problem": problem, "solution": answer(a, b), "answer": answer(a, b)}


TASK = dataclasses.replace(
    leaking_subtraction.TASK,
    name="leak_classes",
    alphabet="0123456789-=b.,;:|HX~ABCDPQRS$_",
    corpus_row=corpus_row,
    training_problems=training_problems,
    held_out_problems=held_out_problems,
)
