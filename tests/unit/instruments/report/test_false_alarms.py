# Copyright (c) 2026 the megatron_selfdistill authors. Apache-2.0.
"""Chance makes no figure sick, recorded runs that collapse are found, and no change is as old as the run."""

from __future__ import annotations

import json
import math
import random
import sys
from pathlib import Path

import pytest

from megatron_selfdistill.instruments.report import sick_rules
from megatron_selfdistill.instruments.report.figures import GROUPS
from megatron_selfdistill.instruments.report.run_record import RunRecord
from megatron_selfdistill.instruments.report.run_report import sick_figures

HERE = Path(__file__).resolve().parent
COLLAPSED = json.loads((HERE / "collapsed_runs.json").read_text())
"""The recorded metrics of a run of the quickstart's task, and of one of examples/09_leaking_hint.py without guards."""
FIGURES = {figure.title: figure for figures in GROUPS.values() for figure in figures}


def run_of(**metrics) -> RunRecord:
    """Return a run with curves: values over all steps, or [steps, values]; ``__`` stands for a slash in a key."""
    curves = {}
    for key, values in metrics.items():
        over_all_steps = isinstance(values[0], float)
        curves[key.replace("__", "/")] = (list(range(1, len(values) + 1)), values) if over_all_steps else tuple(values)
    return RunRecord("run", {}, curves, [], [], [])


@pytest.fixture
def false_alarms(monkeypatch):
    monkeypatch.setattr(sys, "path", [str(HERE.parents[3] / "experiments"), *sys.path])
    import false_alarms

    return false_alarms


def test_noise_alone_is_called_sick_only_where_chance_has_no_test(false_alarms, monkeypatch):
    runs = [false_alarms.noise(random.Random(number), (40,)) for number in range(25)]
    assert [false_alarms.alarm(run) for run in runs] == [None] * 25
    monkeypatch.setattr(sick_rules, "ODDS", 2)
    assert sum(false_alarms.alarm(run) is not None for run in runs) > 15, "the noise can pass every floor"


def test_a_change_needs_so_many_values_that_their_order_is_rarely_chance():
    for looks in (22, 150, 10_000):
        number = sick_rules.in_a_row(looks)
        chances = [1 / math.comb(sick_rules.FIRST + m, m) for m in (number, number - 1)]
        assert chances[0] * looks <= 1 / sick_rules.ODDS < chances[1] * looks
    assert sick_rules.in_a_row(sick_rules.FEWEST) + sick_rules.FIRST == sick_rules.FEWEST == 22


@pytest.mark.parametrize("name", COLLAPSED)
def test_a_recorded_run_that_collapsed_is_sick_and_not_since_its_first_step(name):
    found = dict(sick_figures(run_of(**COLLAPSED[name])))
    assert {"Entropy", "Accuracy"} <= found.keys() and min(found.values()) > 1


@pytest.mark.parametrize(("right", "problems", "since"), [(4, 12, None), (12, 32, None), (120, 300, 20)])
def test_an_accuracy_that_falls_by_the_chance_of_few_problems_is_not_sick(right, problems, since):
    shares = [1 / problems, round(0.6 * problems) / problems, right / problems]
    run = run_of(evaluation__greedy_accuracy=([0, 10, 20], shares))
    assert FIGURES["Accuracy"].sick_since(run) == since


def test_many_evaluations_of_many_problems_have_a_verdict():
    rng, problems = random.Random(0), 14_042
    shares = [rng.randint(7_000, 7_100) / problems for _ in range(500)]
    curves = {"evaluation__greedy_accuracy": [*range(500)], "evaluation__sampled_accuracy": [*range(500)]}
    run = run_of(**{key: (steps, shares) for key, steps in curves.items()})
    assert FIGURES["Accuracy"].sick_since(run) is None and 5_000 < sick_rules._num_problems(run) <= 10_000
    run = run_of(evaluation__greedy_accuracy=([*range(500)], [*shares[:400], *(share - 0.1 for share in shares[400:])]))
    assert FIGURES["Accuracy"].sick_since(run) == 400


def test_a_loss_whose_noise_hides_its_fall_is_not_called_flat():
    rng = random.Random(0)
    noisy, still = ([1 + rng.gauss(0, spread) for _ in range(60)] for spread in (0.3, 0.02))
    assert FIGURES["Loss"].sick_since(run_of(loss__mean=noisy)) is None
    assert FIGURES["Loss"].sick_since(run_of(loss__mean=still)) == 51
