# Copyright (c) 2026 the megatron_selfdistill authors. Apache-2.0.
"""Subtractions and additions together: a base that is weak at both tasks, and a specialist for each of them.

Every record names its task as its teacher.  The two tasks share one tokenizer and one corpus.
"""

from __future__ import annotations

import random
from typing import Any

from _lib import additions, subtraction
from _lib.task import Record, Task

TASKS = {"additions": additions.TASK, "subtraction": subtraction.TASK}


def corpus_row(rng: random.Random) -> tuple[str, str, str]:
    """Return a row (prompt, input text, target text) of the corpus of either task, each in half of the rows."""
    return rng.choice([task.corpus_row for task in TASKS.values()])(rng)


def training_problems(seed: int) -> list[Record]:
    """Return the training problems of both tasks."""
    return [record for name in TASKS for record in problems_of(name, seed)]


def problems_of(name: str, seed: int) -> list[Record]:
    """Return the training problems of one task, which name it as their teacher."""
    return [{**record, "teacher": name} for record in TASKS[name].training_problems(seed)]


def held_out_problems() -> list[Record]:
    """Return the held-out problems of both tasks."""
    return [record for task in TASKS.values() for record in task.held_out_problems()]


def verify(response: str, problem: Any) -> bool:
    """Return whether the response is right; ``evaluation.verifier=_lib.two_tasks.verify`` names this function."""
    if "-" in problem.messages[-1]["content"]:
        return subtraction.verify(response, problem)
    return additions.verify(response, problem)


def shows_work(response: str) -> bool:
    """Return whether a response shows its work, in the form of either task."""
    return subtraction.shows_work(response) or additions.shows_work(response)


TASK = Task(
    "two_tasks",
    alphabet=subtraction.TASK.alphabet,  # which has all characters of additions
    corpus_row=corpus_row,
    training_problems=training_problems,
    held_out_problems=held_out_problems,
    shows_work=shows_work,
    overrides=("evaluation.verifier=_lib.two_tasks.verify",),
    pretraining=additions.TASK.pretraining,
    pretraining_steps=3000,
)
