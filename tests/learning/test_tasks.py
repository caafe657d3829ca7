# Copyright (c) 2026 the megatron_selfdistill authors. Apache-2.0.
"""The tasks of the examples and what answers in them: right work is right, splits share no problem, tools are right."""

from __future__ import annotations

import functools
import random
from collections.abc import Iterator
from types import SimpleNamespace

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
from _lib.calculator import Calculator, episode
from _lib.checked_subtraction import conversation, hint, satisfaction, skill, summarize
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


@pytest.mark.parametrize("module", [subtraction, ragged_subtraction], ids=lambda module: module.TASK.name)
def test_work_without_bugs_is_right_and_is_work(module):
    rng = random.Random(0)
    for _ in range(300):
        a, b = module.random_pair(rng, "train")
        response = module.work(a, b).rstrip("$")
        digits = "".join(c for c in response.partition(";")[2] if c.isdigit())
        assert int(digits) == a - b
        assert module.verify(response, SimpleNamespace(answer=module.answer(a, b)))
        assert module.shows_work(response)


def test_a_response_is_verified_by_its_one_final_answer():
    assert subtraction.verify(RIGHT, PROBLEM)
    assert subtraction.verify(";092", PROBLEM), "an answer without work is right; shows_work tells it apart"
    for wrong in ("092", "08=2b;092;092", "08=2b,00=9b,54=0.;092b", "08=2b,00=9b,54=0.;93", ""):
        assert not subtraction.verify(wrong, PROBLEM), wrong
    assert not subtraction.shows_work(";092")


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


def test_wrong_hints_differ_in_one_digit_and_the_answers_stay_right(load_example):
    records = load_example("02_wrong_hints").problems_with_wrong_hints(5, 0.6)
    differing = [sum(x != y for x, y in zip(r["solution"], r["answer"], strict=True)) for r in records]
    assert set(differing) == {0, 1} and 0.56 < sum(differing) / len(differing) < 0.64
    assert [r["answer"] for r in records] == [r["answer"] for r in training_problems(subtraction.TASK, 5)]


def test_additions_have_as_many_right_answers_as_they_should():
    rng = random.Random(0)
    answers = {additions.some_answer(57, rng) for _ in range(3000)}
    assert len(answers) == 58 and all(additions.is_right(text, 57) for text in answers)
    assert not any(additions.is_right(additions.off_by_one(text, rng), 57) for text in answers)
    assert not additions.is_right("57;0", 57) and not additions.is_right("57", 57)


def played(a: int, b: int, responses: list[str]) -> tuple[list[str], float]:
    """Return the replies of the calculator to these responses, and the last reward."""
    said, shown = [], []
    for response in responses:
        reply = Calculator().reply(problem(a, b), [*said, response])
        said += [response, reply.text or ""]
        shown.append(reply)
    assert [reply.done for reply in shown] == [False] * (len(responses) - 1) + [True]
    return [reply.text for reply in shown[:-1]], shown[-1].reward


def test_right_calls_of_the_calculator_end_with_the_right_answer_and_a_slip_with_a_wrong_one():
    rng = random.Random(0)
    assert episode(500, 408) == (["T08.", "T00b", "T54b", ";092"], [">2b", ">9b", ">0."])
    assert episode(500, 408, rng, 1.0) == (["T80.", "T00.", "T54.", ";108"], [">8.", ">0.", ">1."])
    for _ in range(200):
        a, b = subtraction.random_pair(rng, "corpus")
        responses, results = episode(a, b)
        assert played(a, b, responses) == (results, 1.0)
        wrong, results = episode(a, b, rng, 1.0)
        assert played(a, b, wrong) == (results, float(wrong == responses))
    assert any(episode(52, 38, rng, 0.5)[0][:2] == ["T28.", "T53."] for _ in range(99)), "a loan is forgotten alone"


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


def test_an_episode_of_the_checker_ends_with_a_right_answer_or_with_the_second_response():
    assert Checker().reply(PROBLEM, [RIGHT]) == Reply(None, "user", None, 1.0, done=True)
    second = Checker().reply(PROBLEM, ["", "X1", "08=2b"])
    assert second.done and second.text == "X2" and second.reward == 0.0
    assert Checker().reply(PROBLEM, ["", "X1", RIGHT]).reward == 1.0


def test_the_writers_of_hints_say_what_the_checker_says():
    assert skill(500, 408) == "S12" and skill(588, 108) == "S"
    assert summarize(PROBLEM, RIGHT, 1.0) == "S12" and summarize(PROBLEM, WRONG, 0.0) == "X2"
    for attempt in (RIGHT, WRONG):
        *said, reply = conversation(500, 408, attempt)["messages"]
        assert [message["content"] for message in said] == ["500-408:", attempt]
        asked = SimpleNamespace(reply=SimpleNamespace(next_state=[reply]))
        assert hint(PROBLEM, attempt, [reply]) == Checker().reply(PROBLEM, [attempt]).text
        assert satisfaction(attempt, asked) == (1.0 if attempt == RIGHT else -1.0)
