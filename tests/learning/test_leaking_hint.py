# Copyright (c) 2026 the megatron_selfdistill authors. Apache-2.0.
"""A leaking hint: the tasks leak as often as documented, the conclusion is computed, and the anchor holds the leak."""

from __future__ import annotations

import dataclasses
import random

import pytest

from _lib import (
    leaking_subtraction,
    pretraining,
    subtraction,
    unsolved_subtraction,
)
from _lib.watched_runs import WITHOUT_GUARDS, Point, watch


def leaks(mark: str, count: int = 6000) -> list[bool]:
    """Return for each row whose prompt ends with the hint ``mark``, or with none, whether its target is a leak."""
    rng = random.Random(3)
    rows = [leaking_subtraction.corpus_row(rng) for _ in range(count)]
    of_hint = [(prompt.partition(":")[2][:1], target) for prompt, _, target in rows]
    return [target.startswith(";") for found, target in of_hint if found == mark]


def test_a_tenth_of_the_unhinted_and_seven_tenths_of_the_hinted_demonstrations_leak():
    own, hinted = leaks(""), leaks("~")
    assert 0.6 < len(own) / 6000 < 0.64
    assert 0.085 < sum(own) / len(own) < 0.115
    assert 0.66 < sum(hinted) / len(hinted) < 0.74
    assert not any(leaks("H"))


def test_leaks_after_a_hint_are_right_and_those_of_homework_mostly_wrong():
    rng, right = random.Random(4), {"": [], "~": []}
    for _ in range(6000):
        prompt, _, target = leaking_subtraction.corpus_row(rng)
        numbers, _, hint = prompt.partition(":")
        a, b = map(int, numbers.split("-"))
        if target.startswith(";"):
            right[hint[:1]].append(target == f";{subtraction.answer(a, b)}$")
    assert all(right["~"]) and sum(right[""]) / len(right[""]) < 0.5


def test_without_a_hint_no_hard_problem_is_ever_solved():
    rng = random.Random(6)
    for a, b in subtraction.hard_problems("train")[:200]:
        text = leaking_subtraction.homework(a, b, rng, leak=0.0, zero_bug=1.0)[:-1]
        assert subtraction.shows_work(text) and text.partition(";")[2] != subtraction.answer(a, b)
    ids = {record["id"] for record in unsolved_subtraction.TASK.held_out_problems()}
    assert ids <= {f"{a}-{b}" for a, b in subtraction.hard_problems("test")}


def points(*figures: tuple[float, float]) -> list[Point]:
    """Return points with (sampled accuracy, share of work), 50 steps apart."""
    return [Point(50 * i, 0.5, sampled, work, 0.1, 1.0) for i, (sampled, work) in enumerate(figures)]


def test_the_conclusion_follows_from_the_points(load_example):
    example = load_example("09_leaking_hint")
    held = {
        example.TEACHER_ALONE: points((0.3, 0.9), (0.6, 0.7), (0.2, 0.3)),
        example.ANCHORED: points((0.3, 0.9), (0.8, 0.85)),
    }
    shown = example.conclusion(held)
    assert "reaches 0.600 (step 50), which is below the 0.800" in shown
    assert "Anchored keeps the most work: the share changes by -0.05" in shown
    lost = {example.STUDENT_MIX: points((0.3, 0.9), (0.7, 0.8)), example.ANCHORED: points((0.3, 0.9), (0.5, 0.4))}
    shown = example.conclusion(lost)
    assert "which is not below the 0.500" in shown
    assert "even Anchored loses 0.50 of the work" in shown


def test_runs_are_measured_at_ascending_steps_that_differ(load_example):
    example = load_example("09_leaking_hint")
    assert example.moments(200) == [0, 25, 50, 100, 200]
    assert example.moments(2) == [0, 1, 2]


@pytest.mark.full
def test_the_example_runs_to_its_end(load_example, root, shorten, capsys):
    shorten(leaking_subtraction, 20)
    assert load_example("09_leaking_hint").main(["--steps", "2", "--forward", "--directory", str(root)]) == 0
    shown = capsys.readouterr().out
    assert "Anchored, forward KL" in shown and "Early stopping is the competitor" in shown
    assert (root / "leaking_hint" / "seed5" / "curves.png").stat().st_size > 10_000


@pytest.mark.full
def test_the_anchor_keeps_the_work_that_the_teacher_alone_drops(load_example, root):
    example = load_example("09_leaking_hint")
    few = dataclasses.replace(leaking_subtraction.TASK, held_out_problems=lambda: subtraction.held_out_problems()[:150])
    base = pretraining.make_base(few, 5, root / "bases")
    problems = pretraining.write_records(root / "leaking.jsonl", leaking_subtraction.TASK.training_problems(5))
    work, sampled = {}, {}
    for variant in (example.TEACHER_ALONE, example.ANCHORED):
        unguarded = variant.on(problems, *WITHOUT_GUARDS)
        before, after = watch(unguarded, base, root / "leaking" / variant.title, (0, 100))
        work[variant], sampled[variant] = after.shows_work, after.sampled
    assert before.shows_work > 0.85
    assert work[example.TEACHER_ALONE] < 0.6 < 0.8 < work[example.ANCHORED]
    assert sampled[example.ANCHORED] > sampled[example.TEACHER_ALONE] + 0.2
