# Copyright (c) 2026 the megatron_selfdistill authors. Apache-2.0.
"""The tasks of the examples: right work is right, splits share no problem, and wrong hints are as documented."""

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
    pretraining,
    ragged_subtraction,
    subtraction,
    unsolved_subtraction,
)
from _lib.task import Task

MODULES = [subtraction, ragged_subtraction, additions, leaking_subtraction]
TASKS = [*(module.TASK for module in MODULES), unsolved_subtraction.TASK, calculator.TASK, checked_subtraction.TASK]


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
    problem = SimpleNamespace(**subtraction.record(500, 408))
    assert subtraction.verify("08=2b,00=9b,54=0.;092", problem)
    assert subtraction.verify(";092", problem), "an answer without work is right; shows_work tells it apart"
    for wrong in ("092", "08=2b;092;092", "08=2b,00=9b,54=0.;092b", "08=2b,00=9b,54=0.;93", ""):
        assert not subtraction.verify(wrong, problem), wrong
    assert not subtraction.shows_work(";092")


@pytest.mark.parametrize("task", TASKS, ids=lambda task: task.name)
def test_splits_share_no_problem(task):
    held_out = {record["problem"] for record in task.held_out_problems()}
    training = {record["problem"] for seed in (5, 6) for record in training_problems(task, seed)}
    rng = random.Random(0)
    corpus = {task.corpus_row(rng)[0].partition(":")[0] + ":" for _ in range(1000)}
    assert held_out and training and corpus
    assert not held_out & training
    assert not held_out & corpus
    if task is not additions.TASK:  # whose sums are few: only the held-out ones are new to the base
        assert not training & corpus


def test_wrong_hints_differ_in_one_digit_and_the_answers_stay_right(load_example):
    records = load_example("02_wrong_hints").problems_with_wrong_hints(5, 0.6)
    differing = [sum(x != y for x, y in zip(r["solution"], r["answer"], strict=True)) for r in records]
    assert set(differing) == {0, 1}
    assert 0.56 < sum(differing) / len(differing) < 0.64
    assert [r["answer"] for r in records] == [r["answer"] for r in training_problems(subtraction.TASK, 5)]


def test_additions_have_as_many_right_answers_as_they_should():
    rng = random.Random(0)
    answers = {additions.some_answer(57, rng) for _ in range(3000)}
    assert len(answers) == 58
    assert all(additions.is_right(text, 57) for text in answers)
    assert not any(additions.is_right(additions.off_by_one(text, rng), 57) for text in answers)
    assert not additions.is_right("57;0", 57)
    assert not additions.is_right("57", 57)


def test_the_tokenizer_has_one_token_per_character(tmp_path):
    from megatron_selfdistill.data.tokenizer_files import load_tokenizer

    pretraining.write_tokenizer(tmp_path, subtraction.TASK.alphabet)
    tokenizer = load_tokenizer(str(tmp_path))
    text = "500-408:H092|08=2b,00=9b,54=0.;092$"
    ids = tokenizer.encode(text)
    assert ids == [subtraction.TASK.alphabet.index(c) for c in text]
    assert tokenizer.decode(ids) == text
    assert tokenizer.eos_id == subtraction.TASK.alphabet.index("$")
    assert tokenizer.vocab_size == len(subtraction.TASK.alphabet)
    assert tokenizer.render_chat([{"role": "user", "content": "500-408:"}]) == "500-408:"
