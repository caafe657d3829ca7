# Copyright (c) 2026 the megatron_selfdistill authors. Apache-2.0.
"""The tasks of the examples: right work is right, splits share no problem, hints and corpora are as documented."""

from __future__ import annotations

import functools
import json
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


def problem_of(record: dict) -> SimpleNamespace:
    return SimpleNamespace(**record)


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


def test_the_documented_examples_are_what_the_code_writes():
    assert subtraction.problem_text(500, 408) + subtraction.work(500, 408) == "500-408:08=2b,00=9b,54=0.;092$"
    assert ragged_subtraction.problem_text(500, 48) == "h5t0u0-t4u8:"
    assert ragged_subtraction.work(500, 48) == "u08=2b,t04=5b,h5=4.;h4t5u2$"


def test_the_pupils_bugs_are_the_documented_ones():
    always = random.Random(0)
    assert subtraction.work(52, 38, always, bug=1.0) == "28=6.,53=2.,00=0.;026$", "smaller from larger"
    assert subtraction.work(500, 408, always, zero_bug=1.0) == "08=8.,00=0.,54=1.;108$", "0 - N = N"


def test_a_response_is_verified_by_its_one_final_answer():
    problem = problem_of(subtraction.record(500, 408))
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


@pytest.mark.parametrize("task", TASKS, ids=lambda task: task.name)
def test_problems_have_ids_of_their_own_and_stay_the_same(task):
    for records in (task.held_out_problems(), training_problems(task, 5)):
        assert len({record["id"] for record in records}) == len(records)
    assert task.training_problems(5) == training_problems(task, 5)
    assert (training_problems(task, 5) == training_problems(task, 6)) == (
        task is unsolved_subtraction.TASK  # has equal training problems for all seeds
    )


@pytest.mark.parametrize("task", TASKS, ids=lambda task: task.name)
def test_what_is_read_and_what_is_predicted_are_equally_long_and_in_the_alphabet(task):
    rng = random.Random(1)
    rows = [task.corpus_row(rng) for _ in range(500)]
    for prompt, read, predicted in rows:
        assert len(read) == len(predicted)
        assert predicted.endswith("$")
        assert set(prompt + read + predicted) <= set(task.alphabet)
    assert len(task.alphabet) == len(set(task.alphabet))


def test_demonstrations_without_a_hint_are_buggy_and_those_behind_one_clean():
    rng = random.Random(2)
    right = {True: [], False: []}
    for _ in range(4000):
        prompt, _, predicted = subtraction.corpus_row(rng)
        numbers, _, hint = prompt.partition(":")
        a, b = map(int, numbers.split("-"))
        right[bool(hint)].append(predicted == subtraction.work(a, b))
    assert all(right[True])
    assert 0.30 < sum(right[False]) / len(right[False]) < 0.48
    assert 0.62 < len(right[False]) / 4000 < 0.68


def test_wrong_hints_differ_in_one_digit_and_the_answers_stay_right(load_example):
    records = load_example("02_wrong_hints").problems_with_wrong_hints(5, 0.6)
    differing = [sum(x != y for x, y in zip(r["solution"], r["answer"], strict=True)) for r in records]
    assert set(differing) == {0, 1}
    assert 0.56 < sum(differing) / len(differing) < 0.64
    assert [r["answer"] for r in records] == [r["answer"] for r in training_problems(subtraction.TASK, 5)]


def test_hard_problems_borrow_twice_from_a_zero():
    for split, count in (("train", 415), ("test", 396)):
        pairs = subtraction.hard_problems(split)
        assert len(pairs) == count
        assert all(subtraction.split_of(a, b) == split for a, b in pairs)
        assert all(a % 100 == 0 and b % 10 for a, b in pairs), "two zeros, both below something"
    assert subtraction.borrows_from_zero(300, 4) == 2
    assert subtraction.borrows_from_zero(500, 400) == 0
    assert subtraction.borrows_from_zero(205, 17) == 1


def test_additions_have_as_many_right_answers_as_they_should():
    rng = random.Random(0)
    answers = {additions.some_answer(57, rng) for _ in range(3000)}
    assert len(answers) == 58
    assert all(additions.is_right(text, 57) for text in answers)
    assert not any(additions.is_right(additions.off_by_one(text, rng), 57) for text in answers)
    assert not additions.is_right("57;0", 57)
    assert not additions.is_right("57", 57)


def test_ragged_problems_hints_and_responses_have_many_lengths():
    records = training_problems(ragged_subtraction.TASK, 5)
    assert len({len(r["problem"]) for r in records}) >= 6
    assert len({len(r["solution"]) for r in records}) >= 8
    whole = sum(";" in r["solution"] for r in records)
    assert whole == len(records) // 2, "half of the hints are the whole work"
    longest = max(len(ragged_subtraction.work(9999, 9999)), *(len(r["solution"]) for r in records))
    assert longest <= 44, "rollout.max_new_tokens of the task"


def test_the_tokenizer_has_one_token_per_character(tmp_path):
    from megatron_selfdistill.data.tokenizer import load_tokenizer

    pretraining.write_tokenizer(tmp_path, subtraction.TASK.alphabet)
    tokenizer = load_tokenizer(str(tmp_path))
    text = "500-408:H092|08=2b,00=9b,54=0.;092$"
    ids = tokenizer.encode(text)
    assert ids == [subtraction.TASK.alphabet.index(c) for c in text]
    assert tokenizer.decode(ids) == text
    assert tokenizer.eos_id == subtraction.TASK.alphabet.index("$")
    assert tokenizer.vocab_size == len(subtraction.TASK.alphabet)
    assert tokenizer.render_chat([{"role": "user", "content": "500-408:"}]) == "500-408:"


def test_records_are_written_as_jsonl(tmp_path):
    path = pretraining.write_records(tmp_path / "deep" / "some.jsonl", subtraction.held_out_problems()[:3])
    assert [json.loads(line) for line in path.read_text().splitlines()] == subtraction.held_out_problems()[:3]
