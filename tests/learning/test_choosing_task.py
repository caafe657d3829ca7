# Copyright (c) 2026 the megatron_selfdistill authors. Apache-2.0.
"""The task of four subtractions: its attempts, its checks, what the hints make sure, and the figures of thinking."""

from __future__ import annotations

import random
from types import SimpleNamespace

import pytest

from _lib import choosing_subtraction as task

PROBLEM = ((92, 58), (71, 34), (85, 52), (60, 17)), 1
RIGHT, WRONG = "B14=7b7+73=3.3+", "C52=3.7-85=3.3+"


def rows(count: int, seed: int) -> list[tuple[str, str, str, str, str]]:
    """Return rows of the corpus as (mark of the hint or '', right letter or '', prompt, input text, target text)."""
    rng = random.Random(seed)
    found = []
    for _ in range(count):
        prompt, read, wanted = task.corpus_row(rng)
        hint = prompt.partition(":")[2]
        found.append((hint[:1], hint[1:2], prompt, read, wanted))
    return found


def test_the_documented_example_is_what_the_code_writes():
    assert task.problem_text(PROBLEM) == "A2895B1473C5285D0761=73:"
    assert task.attempt(PROBLEM, "B") == RIGHT
    assert task.attempt(PROBLEM, "C") == WRONG
    assert task.attempts(f"{WRONG}n{RIGHT}y") == [f"{WRONG}n", f"{RIGHT}y"]


def test_the_last_attempt_counts():
    problem = SimpleNamespace(answer="B")
    for right in (f"{RIGHT}y", f"{WRONG}n{RIGHT}y", f"{WRONG}n{WRONG}n{RIGHT}n"):
        assert task.verify(right, problem), right
    for wrong in (f"{RIGHT}n{WRONG}y", f"{WRONG}y", RIGHT, "B", "", f"{WRONG}n{WRONG}n{WRONG}n{RIGHT}y"):
        assert not task.verify(wrong, problem), wrong


def test_a_budget_reads_the_last_complete_attempt():
    response = f"{WRONG}n{RIGHT}n{WRONG}"
    assert [task.answer_within(response, budget) for budget in (1, 2, 3)] == ["C", "B", "B"]
    assert task.answer_within("B14", 3) is None


def test_the_figures_count_attempts_checks_and_budgets():
    found = task.figures([("B", f"{WRONG}n{RIGHT}y"), ("B", f"{WRONG}y"), ("B", f"{RIGHT}n{WRONG}n{RIGHT}y")])
    assert found["attempts"] == 2
    assert (found["within_1"], found["within_2"], found["within_3"]) == pytest.approx((1 / 3, 1 / 3, 2 / 3))
    assert found["overlooked"] == pytest.approx(1 / 3)
    assert found["rejected"] == pytest.approx(1 / 3)


def test_without_a_hint_more_attempts_are_more_often_right():
    rng = random.Random(0)
    problems = [task.random_problem(rng, "corpus") for _ in range(3000)]
    thoughts = [(task.LETTERS[problem[1]], task.thought(problem, rng).removesuffix("$")) for problem in problems]
    found = task.figures(thoughts)
    assert found["within_1"] == pytest.approx(0.25, abs=0.03)
    assert found["within_2"] == pytest.approx(0.43, abs=0.03)
    assert found["within_3"] == pytest.approx(0.58, abs=0.03)
    assert found["overlooked"] == pytest.approx(task.OVERLOOKED, abs=0.03)
    letters = [[made[0] for made in task.attempts(response)] for _, response in thoughts]
    assert all(len(set(tried)) == len(tried) <= task.MAX_ATTEMPTS for tried in letters)


@pytest.mark.parametrize("mark", task.SURE)
def test_a_hint_names_the_letter_and_makes_some_writers_sure(mark):
    accepted = []
    for of_row, right, _, read, wanted in rows(6000, seed=1):
        if of_row != mark:
            continue
        tried = list(zip(task.attempts(read[:-1]), task.attempts(wanted[:-1]), strict=True))
        assert all(target[0] == right for _, target in tried)
        assert all(target[-1] == "y" for made, target in tried if made[0] == right)
        accepted += [target[-1] == "y" for made, target in tried[:1] if made[0] != right]
    assert sum(accepted) / len(accepted) == pytest.approx(task.SURE[mark], abs=0.06)


def test_the_splits_share_no_problem():
    held_out = {record["problem"] for record in task.held_out_problems()}
    training = {record["problem"] for seed in (5, 6) for record in task.training_problems(seed)}
    corpus = {prompt.partition(":")[0] + ":" for _, _, prompt, _, _ in rows(3000, seed=0)}
    assert (len(held_out), len(training)) == (task.NUM_HELD_OUT, 2 * task.NUM_TRAINING)
    assert not (held_out & training or held_out & corpus or training & corpus)


def test_what_is_read_and_what_is_predicted_are_equally_long_and_in_the_alphabet():
    for _, _, prompt, read, wanted in rows(500, seed=2):
        assert len(read) == len(wanted)
        assert set(prompt + read + wanted) <= set(task.TASK.alphabet)
        assert task.shows_work(read.removesuffix("$"))


def test_both_hints_are_hints_to_the_same_problems():
    sure, surer = (task.training_problems(5, mark) for mark in task.SURE)
    assert [record["problem"] for record in sure] == [record["problem"] for record in surer]
    assert {record["solution"] for record in surer} == {f"K{letter}" for letter in task.LETTERS}


def test_a_hinted_writer_works_cleanly_and_sees_what_stands_there():
    """A bug of the text that the writer reads is not repeated, and its mark stays."""
    buggy = "A28=6.7-95=4.3-n" + "B14=3.7-73=4.3-n$"
    assert task.hinted_target(PROBLEM, buggy, sure=False) == "B28=4b7-95=3.3-nB14=7b7-73=3.3-y$"
    assert task.hinted_target(PROBLEM, buggy, sure=True) == "B28=4b7-95=3.3-yB14=7b7-73=3.3-y$"
