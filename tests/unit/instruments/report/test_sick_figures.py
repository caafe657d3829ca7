# Copyright (c) 2026 the megatron_selfdistill authors. Apache-2.0.
"""When a figure of a report is sick, how rarely chance alone makes it so, and what a report says first of a run."""

from __future__ import annotations

import json
import math
import random
import re
import sys

import pytest
from metric_keys import documented
from tiny_run import REPOSITORY

from megatron_selfdistill.instruments.report import sick_rules
from megatron_selfdistill.instruments.report.figures import GROUPS
from megatron_selfdistill.instruments.report.run_record import PHASES, RunRecord
from megatron_selfdistill.instruments.report.run_report import sick_figures, summary

COLLAPSED = json.loads((REPOSITORY / "tests/unit/instruments/report/collapsed_runs.json").read_text())
"""The recorded metrics of a run of the quickstart's task, and of one of examples/09_leaking_hint.py without guards."""
FIGURES = {figure.title: figure for figures in GROUPS.values() for figure in figures}
STEPS = range(1, 41)
SAMPLED, GREEDY = "evaluation/sampled_accuracy", "evaluation/greedy_accuracy"


def run_of(series, **config) -> RunRecord:
    """Return a run with curves: (steps, values), values of all steps, constants, or functions of the step.

    The steps of constants and functions are 1 to 40, and of evaluations every tenth one.
    """
    curves = {}
    for key, value in series.items():
        steps = list(range(0, 41, 10)) if key.startswith("evaluation") else list(STEPS)
        if isinstance(value, tuple):
            curves[key] = value
        elif isinstance(value, list):
            curves[key] = (list(range(1, len(value) + 1)), value)
        else:
            curves[key] = (steps, [value(step) if callable(value) else value for step in steps])
    return RunRecord("run", {key.replace("__", "."): value for key, value in config.items()}, curves, [], [], [])


def after(step, low, high):
    return lambda at: high if at >= step else low


def falling(step):
    return 1 / step + 0.001


noise = random.Random(0)
NOISE = {step: noise.gauss(0, 0.1) for step in STEPS}
# Of 1000 problems, and of 100.
LEARNS = {GREEDY: lambda step: 0.303 + step / 100, SAMPLED: lambda step: 0.303 + step / 100}
FALLS = {GREEDY: after(20, 0.61, 0.21), SAMPLED: after(20, 0.61, 0.21)}
LIMITS = {"guards__reference_steps": 5, "guards__patience": 3, "guards__entropy__max_ratio": 3.0}
LIMITS |= {"guards__min_length_ratio": 0.25}

# Figures that are sick since step 25, when the metric moves from the first value to the second.
STEPPED = {
    "Surprise at the response": ("teacher_cross_entropy", 0.4, 0.9),
    "Entropy": ("entropy/student", 0.4, 0.9),
    "Length of the responses": ("response/length_mean", 100, 20),
    "Responses that are cut": ("response/truncated_share", 0.02, 0.5),
    "Norm of the gradient": ("gradient_norm", 0.5, math.nan),
    "Target's mass on tokens that a model hardly considers": ("target/mass_on_rare_reference", 0.01, 0.05),
    "Pieces of the hint in the responses": ("leak/hint_8grams", 0.01, 0.4),
    "Words about the hint": ("leak/words_per_1000", 0.1, 5),
    "Difference of the log-probs": ("sampler/log_prob_mean_abs_diff", 0.01, 0.5),
    "Correction for the sampler": ("correction/capped", 0.01, 0.3),
    "Guided responses": ("guided/log_ratio", 0.1, 0.9),
    "Log-prob of the logged turns": ("turns/log_prob_mean", -1, -3),
    "Responses that end in a loop": ("response/loop_share", 0.3, 0.45),
}
# title -> (healthy series, sick series, the step since which the second is sick)
CASES = {title: ({key: low}, {key: after(25, low, high)}, 25) for title, (key, low, high) in STEPPED.items()} | {
    "Accuracy": (LEARNS, FALLS, 20),
    "Overconfidence": (
        LEARNS | {"evaluation/greedy_ocg": lambda step: 0.3 - step / 100},
        LEARNS | {"evaluation/sampled_ocg": after(20, 0.1, 0.4)},
        20,
    ),
    "Loss": ({"loss/mean": falling}, {"loss/mean": lambda step: 2 + NOISE[step]}, 31),
    "Tokens without a match": ({"status/unconverged": 0.0}, {"status/unconverged": lambda step: 0.01 * (step == 7)}, 7),
    "Memory": ({"memory/peak_gib": after(4, 10, 50)}, {"memory/rss_gib": lambda step: 10 + step}, 11),
}


def test_every_figure_with_a_rule_has_a_case():
    assert CASES.keys() == {title for title, figure in FIGURES.items() if figure.rules}


@pytest.mark.parametrize("title", CASES)
def test_a_figure_is_sick_by_its_rule_on_a_sick_run_and_not_on_a_healthy_one_or_by_one_odd_value(title):
    healthy, sick, since = CASES[title]
    rule = FIGURES[title].sick_since
    assert rule(run_of(healthy)) is None
    assert rule(run_of(sick)) == since
    assert rule(run_of({})) is None
    if title in STEPPED:
        key, low, high = STEPPED[title]
        assert rule(run_of({key: after(40, low, high)})) is None
        assert rule(run_of({key: lambda step: high if 20 <= step < 30 else low})) is None, "it has recovered"


@pytest.mark.parametrize("odd", [math.nan, -math.inf, 1e308, 0.0])
def test_no_value_stops_a_rule(odd):
    keys = [key for figure in FIGURES.values() for key in figure.metrics]
    for values in (odd, after(20, 0.1, odd), after(20, odd, 0.1)):
        assert len(summary(run_of(dict.fromkeys(keys, values), **LIMITS))) == 3


def test_noise_alone_is_called_sick_only_where_chance_has_no_test(monkeypatch):
    monkeypatch.setattr(sys, "path", [str(REPOSITORY / "experiments"), *sys.path])
    import false_alarms

    runs = [false_alarms.noise(random.Random(number), (40,)) for number in range(12)]
    assert [false_alarms.alarm(run) for run in runs] == [None] * 12
    monkeypatch.setattr(sick_rules, "ODDS", 2)
    assert sum(false_alarms.alarm(run) is not None for run in runs) > 3, "the noise can pass every floor"


@pytest.mark.parametrize("name", COLLAPSED)
def test_a_recorded_run_that_collapsed_is_sick_and_not_since_its_first_step(name):
    curves = {key.replace("__", "/"): values for key, values in COLLAPSED[name].items()}
    over_all_steps = {key: isinstance(values[0], float) for key, values in curves.items()}
    found = dict(sick_figures(run_of({k: v if over_all_steps[k] else tuple(v) for k, v in curves.items()})))
    assert {"Entropy", "Accuracy"} <= found.keys() and min(found.values()) > 1


@pytest.mark.parametrize(("right", "problems", "since"), [(4, 12, None), (12, 32, None), (120, 300, 20)])
def test_an_accuracy_that_falls_by_the_chance_of_few_problems_is_not_sick(right, problems, since):
    shares = [1 / problems, round(0.6 * problems) / problems, right / problems]
    assert FIGURES["Accuracy"].sick_since(run_of({GREEDY: ([0, 10, 20], shares)})) == since


def test_a_sick_run_names_its_figures_and_its_guard_and_one_of_few_steps_is_not_called_healthy():
    run = run_of(FALLS | {"entropy/student": after(25, 0.5, 1.6)}, **LIMITS)
    run.events.append({"time": "", "step": 40, "event": "guard", "reason": "step 40: entropy explosion; lower it"})
    learns, healthy, _ = summary(run)
    assert learns == ("Does not learn", "accuracy (greedy) 0.610 → 0.210, steps 0 to 40", "bad")
    assert healthy.label == "Sick" and "step 40: entropy explosion" in healthy.text
    assert list(sick_figures(run)) == [("Accuracy", 20), ("Entropy", 25)]
    learns, healthy, _ = summary(run_of({"entropy/student": ([1, 2, 3], [0.5] * 3), GREEDY: ([0], [0.3])}))
    assert (learns.label, healthy.label) == ("Learns?", "Healthy?")


def test_every_metric_of_a_figure_is_one_that_a_run_can_write():
    known = {re.sub(r"_[NK]$", "_*", key) for key in documented()}
    known |= {f"reverse_kl/tenth_{n:02d}" for n in range(1, 11)}
    for figure in FIGURES.values():
        assert {key.replace("evaluation_hinted/", "evaluation/") for key in figure.metrics} <= known, figure.title
    phases = {key for key in documented() if key.startswith("seconds/") and key != "seconds/step"}
    assert {f"seconds/{phase}" for phase in PHASES} == phases
