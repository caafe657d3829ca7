# Copyright (c) 2026 the megatron_selfdistill authors. Apache-2.0.
"""The first lines of a report follow from the metrics, by the rules that stand under the figures."""

from __future__ import annotations

import math
import random

import pytest
from reported_runs import blocks_of, write_run

from megatron_selfdistill.instruments.report.figures import GROUPS
from megatron_selfdistill.instruments.report.run_record import RunRecord, read_runs
from megatron_selfdistill.instruments.report.run_report import report_page, sick_figures, summary

FIGURES = {figure.title: figure for figures in GROUPS.values() for figure in figures if figure.rules}
STEPS = range(1, 41)


def falling(step):
    return 1 / step + 0.001


def run_of(series, **config) -> RunRecord:
    """Return a run with values of metrics: constants or functions of the step; evaluations at every tenth step."""
    metrics = {}
    for key, value in series.items():
        steps = [0, 10, 20, 30, 40] if key.startswith("evaluation") else list(STEPS)
        metrics[key] = (steps, [value(step) if callable(value) else value for step in steps])
    return RunRecord("run", {key.replace("__", "."): value for key, value in config.items()}, metrics, [], [], [])


def after(step, low, high):
    """Return the function that is ``high`` from ``step`` on, and ``low`` before."""
    return lambda at: high if at >= step else low


SAMPLED, GREEDY = "evaluation/sampled_accuracy", "evaluation/greedy_accuracy"
# 1000 problems, and 100
LEARNS = {GREEDY: lambda step: 0.303 + step / 100, SAMPLED: lambda step: 0.303 + step / 100}
FALLS = {GREEDY: after(20, 0.61, 0.21), SAMPLED: after(20, 0.61, 0.21)}
LIMITS = {"guards__reference_steps": 5, "guards__patience": 3, "guards__entropy__max_ratio": 3.0}
LIMITS |= {"guards__min_length_ratio": 0.25}
noise = random.Random(0)
NOISE = {step: noise.gauss(0, 0.1) for step in STEPS}

# title -> (healthy series, sick series, the step since which the second is sick)
CASES = {
    "Accuracy": (LEARNS, FALLS, 20),
    "Overconfidence": (
        LEARNS | {"evaluation/greedy_ocg": lambda step: 0.3 - step / 100},
        LEARNS | {"evaluation/sampled_ocg": after(20, 0.1, 0.4)},
        20,
    ),
    "Loss": ({"loss/mean": falling}, {"loss/mean": lambda step: 2 + NOISE[step]}, 31),
    "Surprise at the response": (
        {"teacher_cross_entropy": falling},
        {"teacher_cross_entropy": after(25, 0.4, 0.9)},
        25,
    ),
    "Entropy": ({"entropy/student": falling}, {"entropy/student": after(25, 0.4, 0.9)}, 25),
    "Tokens without a match": ({"status/unconverged": 0.0}, {"status/unconverged": lambda step: 0.01 * (step == 7)}, 7),
    "Length of the responses": ({"response/length_mean": 100}, {"response/length_mean": after(25, 100, 20)}, 25),
    "Responses that are cut": (
        {"response/truncated_share": 0.02},
        {"response/truncated_share": after(25, 0.02, 0.5)},
        25,
    ),
    "Responses that end in a loop": (
        {"response/loop_share": lambda step: 0.3 + 0.09 * (step > 25)},
        {"response/loop_share": after(25, 0.3, 0.45)},
        25,
    ),
    "Norm of the gradient": ({"gradient_norm": 0.5}, {"gradient_norm": after(25, 0.5, math.nan)}, 25),
    "Target's mass on tokens that a model hardly considers": (
        {"target/mass_on_rare_student": 0.01},
        {"target/mass_on_rare_reference": after(25, 0.01, 0.05)},
        25,
    ),
    "Pieces of the hint in the responses": ({"leak/hint_8grams": 0.01}, {"leak/hint_8grams": after(25, 0.01, 0.4)}, 25),
    "Words about the hint": ({"leak/words_per_1000": 0.1}, {"leak/words_per_1000": after(25, 0.1, 5)}, 25),
    "Difference of the log-probs": (
        {"sampler/log_prob_mean_abs_diff": 0.01},
        {"sampler/log_prob_mean_abs_diff": after(25, 0.01, 0.5)},
        25,
    ),
    "Correction for the sampler": ({"correction/capped": 0.01}, {"correction/capped": after(25, 0.01, 0.3)}, 25),
    "Guided responses": ({"guided/log_ratio": 0.1}, {"guided/log_ratio": after(25, 0.1, 0.9)}, 25),
    "Log-prob of the logged turns": ({"turns/log_prob_mean": -1.0}, {"turns/log_prob_mean": after(25, -1, -3)}, 25),
    "Memory": ({"memory/peak_gib": after(4, 10, 50)}, {"memory/rss_gib": lambda step: 10 + step}, 11),
}


def test_every_figure_with_a_rule_has_a_case():
    assert CASES.keys() == FIGURES.keys()


@pytest.mark.parametrize("title", CASES)
def test_a_figure_is_sick_by_its_rule_on_a_sick_run_and_not_on_a_healthy_one(title):
    healthy, sick, since = CASES[title]
    rule = FIGURES[title].sick_since
    assert rule(run_of(healthy)) is None
    assert rule(run_of(sick)) == since
    assert rule(run_of({})) is None


@pytest.mark.parametrize("title", [title for title, (*_, since) in CASES.items() if since == 25])
def test_one_odd_value_of_a_step_makes_no_figure_sick(title):
    _, sick, _ = CASES[title]
    spike = {
        key: (lambda step, of=value: of(25 if step == 40 else 1)) if callable(value) else value
        for key, value in sick.items()
    }
    assert FIGURES[title].sick_since(run_of(spike)) is None


def test_a_figure_that_was_sick_and_has_recovered_is_healthy():
    recovered = {"entropy/student": lambda step: 0.9 if 20 <= step < 30 else 0.4}
    assert FIGURES["Entropy"].sick_since(run_of(recovered)) is None


def test_a_healthy_run_opens_with_what_it_has_learnt_and_what_has_changed(tmp_path):
    (run,) = read_runs([write_run(tmp_path / "first")])
    entropy = run.values("entropy/student")
    assert summary(run) == [
        ("Learns", "accuracy (greedy) 0.300 → 0.900, steps 0 to 30", "good"),
        ("Healthy", "no guard has spoken, and no figure is sick", "good"),
        ("Changed", f"entropy {entropy[0]:.3g} → {entropy[-1]:.3g}, length {summary_length(run)}", "open"),
    ]
    shown = blocks_of(report_page([run]))["overview"]["runs"][0]["summary"]
    assert shown == [list(line) for line in summary(run)]


def summary_length(run):
    lengths = run.values("response/length_mean")
    return f"{lengths[0]:.3g} → {lengths[-1]:.3g}"


def test_a_sick_run_names_its_figures_and_its_guard():
    run = run_of(FALLS | {"entropy/student": after(25, 0.5, 1.6)}, **LIMITS)
    run.events.append({"time": "", "step": 40, "event": "guard", "reason": "step 40: entropy explosion; lower it"})
    learns, healthy, _ = summary(run)
    assert learns == ("Does not learn", "accuracy (greedy) 0.610 → 0.210, steps 0 to 40", "bad")
    assert healthy.label == "Sick" and healthy.text == (
        "a guard stopped the run after step 40 (step 40: entropy explosion); Accuracy (since step 20); "
        "Entropy (since step 25)"
    )
    assert [title for title, _ in sick_figures(run)] == ["Accuracy", "Entropy"]


def test_a_run_of_few_steps_is_not_called_healthy():
    run = RunRecord("run", {}, {"entropy/student": ([1, 2, 3], [0.5] * 3), GREEDY: ([0], [0.3])}, [], [], [])
    learns, healthy, _ = summary(run)
    assert learns == ("Learns?", "one evaluation so far: accuracy (greedy) 0.300 at step 0", "open")
    assert healthy == ("Healthy?", "no guard has spoken; too few steps for most rules, 3 of 22", "open")


@pytest.mark.parametrize("odd", [math.nan, math.inf, -math.inf, 1e308, -1e308, 0.0])
def test_no_value_stops_a_rule(odd):
    keys = [key for figure in FIGURES.values() for key in figure.metrics]
    for values in (odd, after(20, 0.1, odd), after(20, odd, 0.1)):
        assert len(summary(run_of(dict.fromkeys(keys, values), **LIMITS))) == 3
