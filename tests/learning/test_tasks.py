# Copyright (c) 2026 the megatron_selfdistill authors. Apache-2.0.
"""The tasks of the examples: one answer is right, splits share no problem, the checker names the first mistake."""

from __future__ import annotations

import functools
import random
from collections.abc import Iterator

import pytest

from _lib import (
    additions,
    calculator,
    checked_subtraction,
    leaking_subtraction,
    ragged_subtraction,
    subtraction,
    unsolved_subtraction,
)
from _lib.checker import Checker, first_wrong_column
from _lib.task import Task
from megatron_selfdistill.data.episode_reply import Reply
from megatron_selfdistill.data.problems import Problem

MODULES = [subtraction, ragged_subtraction, additions, leaking_subtraction]
TASKS = [*(module.TASK for module in MODULES), unsolved_subtraction.TASK, calculator.TASK, checked_subtraction.TASK]


def problem(a: int, b: int) -> Problem:
    messages = ({"role": "user", "content": f"{a}-{b}:"},)
    return Problem(f"{a}-{b}", messages, "", subtraction.answer(a, b), "file:1")


PROBLEM = problem(500, 408)
RIGHT, WRONG = "08=2b,00=9b,54=0.;092", "08=2b,00=0.,54=1.;102"


@pytest.fixture(scope="module", autouse=True)
def fewer_problems() -> Iterator[None]:
    """Make 400 training problems instead of 2000, by the same rules."""
    with pytest.MonkeyPatch.context() as patch:
        for module in (subtraction, ragged_subtraction, additions):
            patch.setattr(module, "NUM_TRAINING", 400)
        yield


@functools.cache
def training_problems(task: Task, seed: int) -> list[dict]:
    """Return the training problems of a task, made once for all tests."""
    return task.training_problems(seed)


def test_a_response_is_verified_by_its_one_final_answer():
    assert subtraction.verify(RIGHT, PROBLEM)
    assert subtraction.verify(";092", PROBLEM), "an answer without work is right; shows_work tells it apart"
    for wrong in ("092", "08=2b;092;092", "08=2b,00=9b,54=0.;092b", "08=2b,00=9b,54=0.;93", ""):
        assert not subtraction.verify(wrong, PROBLEM), wrong
    assert not subtraction.shows_work(";092")


@pytest.mark.full
@pytest.mark.parametrize("task", TASKS, ids=lambda task: task.name)
def test_splits_share_no_problem(task):
    held_out = {record["problem"] for record in task.held_out_problems()}
    training = {record["problem"] for seed in (5, 6) for record in training_problems(task, seed)}
    rng = random.Random(0)
    corpus = {task.corpus_row(rng)[0].partition(":")[0] + ":" for _ in range(1000)}
    assert held_out and training and corpus
    assert not held_out & training and not held_out & corpus
    if task is not additions.TASK:  # whose sums are few: only the held-out ones are new to the base
        assert not training & corpus


@pytest.mark.parametrize(
    ("attempt", "column"),
    [
        *(("08=8.,00=0.,54=1.;108", 1), (WRONG, 2), ("08=2b,00=9b,54=1.;192", 3), ("08=2b,00=9b", 3), ("", 1)),
        *(("08=2b,00=9b,54=0.;093", 1), ("08=2b,00=9b,54=0.;082", 2), ("08=2b,00=9b,54=0.;92", 1)),
        ("08=2b,00=9b,54=0.", 1),
    ],
)
def test_the_checker_names_the_first_wrong_column_from_the_right(attempt, column):
    assert first_wrong_column(attempt, 500, 408) == column
    assert Checker().reply(PROBLEM, [attempt]) == Reply(f"X{column}", "user", f"X{column}", 0.0, done=False)
