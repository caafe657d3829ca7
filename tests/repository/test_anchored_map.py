# Copyright (c) 2026 the megatron_selfdistill authors. Apache-2.0.
"""The map of docs/anchored.md: its page shows its lines, its cells run once, and its closed form is the target's."""

from __future__ import annotations

import dataclasses
import functools
import json
import math
from collections.abc import Iterable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from megatron_selfdistill import config as configuration


def test_the_page_shows_the_tables_of_the_lines(tools):
    assert tools("anchored_tables").main(["--check"]) == 0, "run python tools/benchmarks/anchored_tables.py"


def test_every_line_is_the_only_one_of_a_cell_that_the_map_has(tools):
    module, experiments = tools("anchored_map"), tools("anchored_experiments")
    lines = module.read_lines(module.LINES)
    cells = [(line["experiment"], line["arm"], line["seed"]) for line in lines]
    assert len(set(cells)) == len(cells)
    for line in lines:
        experiment = experiments.EXPERIMENTS[line["experiment"]]
        assert line["seed"] in experiments.SEEDS
        assert line["arm"] in (*experiment.arms, "base")
        assert line["step"] == ([0] if line["arm"] == "base" else list(experiment.steps))
        if line["arm"] != "base":
            assert line["overrides"][: len(experiment.arms[line["arm"]])] == list(experiment.arms[line["arm"]])


@functools.cache
def composed(overrides: tuple[str, ...]) -> str:
    """Return the configuration of a run as YAML; experiments share many of their runs."""
    return configuration.to_yaml(configuration.load(overrides, "quickstart"))


def different_runs(experiment: Any) -> bool:
    """Return whether no two arms of an experiment compose to one configuration; a mark of the sweep is no setting."""
    settings = [*experiment.task.overrides, *(setting.format(directory="runs") for setting in experiment.settings)]
    arms = {
        arm: overrides for arm, overrides in experiment.arms.items() if experiment.name != "sweep" or arm[-1] == "P"
    }
    runs = {composed((*overrides, *settings)) for overrides in arms.values()}
    return len(runs) == len(arms) > 1


def test_the_arms_of_an_experiment_are_different_runs(tools):
    assert different_runs(tools("anchored_experiments").EXPERIMENTS["leak_forward"])


@pytest.mark.full
def test_the_arms_of_every_experiment_are_different_runs(tools):
    experiments = tools("anchored_experiments").EXPERIMENTS
    assert [name for name, experiment in experiments.items() if not different_runs(experiment)] == []


def test_cells_whose_line_is_there_are_not_run_again(tools, monkeypatch, tmp_path):
    module, lines, run = tools("anchored_map"), tmp_path / "lines.jsonl", []
    done = [{"experiment": "leak", "arm": arm, "seed": 11} for arm in ("base", "student_matched", "student_strict")]
    lines.write_text("".join(json.dumps(line) + "\n" for line in done))
    monkeypatch.setattr(module, "run_cell", lambda cell, *_: run.append((cell.arm, cell.seed)))
    asked = ["--only", "leak", "--seeds", "11", "12", "--arms", "base", "student_matched"]
    assert module.main([*asked, f"--lines={lines}"]) == 0
    assert run == [("base", 12), ("student_matched", 12)]


def test_a_cell_appends_its_line_and_removes_its_run(tools, monkeypatch, tmp_path):
    module, experiments = tools("anchored_map"), tools("anchored_experiments")
    cell, lines = experiments.Cell(experiments.EXPERIMENTS["leak"], "student_strict", 11), tmp_path / "lines.jsonl"
    lines.write_text('{"experiment": "leak"}\n')

    def ran(self, root, directory):
        directory.mkdir(parents=True)
        return {"greedy": [0.5]}

    monkeypatch.setattr(experiments.Cell, "run", ran)
    module.run_cell(cell, lines, tmp_path / "runs")
    first, line = module.read_lines(lines)
    assert first == {"experiment": "leak"}
    assert line.pop("seconds") >= 0
    assert line == {"experiment": "leak", "arm": "student_strict", "seed": 11, "greedy": [0.5]}
    assert not (tmp_path / "runs" / "leak" / "student_strict-seed11").exists()


def test_a_cell_of_the_sweep_trains_and_measures_one_mark_only(tools, monkeypatch, tmp_path):
    experiments, seen = tools("anchored_experiments"), {}
    from _lib.pretraining import Base

    def measured(variant: Any, base: Any, run_dir: Path, *rule: Any) -> dict:
        loaded = configuration.load([*base.overrides, *variant.overrides], "quickstart")
        seen.update(problems=Path(loaded.data.path), held_out=Path(loaded.evaluation.path), rule=rule)
        seen["w"] = loaded.target.teacher_weight
        return {}

    monkeypatch.setattr(experiments, "measured_leaks", measured)
    monkeypatch.setattr(experiments, "make_base", lambda task, seed, root: Base(task, seed, tmp_path, tmp_path, 0.0))
    cell = experiments.Cell(experiments.EXPERIMENTS["sweep"], "fixed_w0.25_R", 11)
    cell.run(tmp_path, tmp_path / "sweep" / "run")
    for name in ("problems", "held_out"):
        ids = [json.loads(line)["id"] for line in seen[name].read_text().splitlines()]
        assert {of_class[-2:] for of_class in ids} == {"AR", "BR", "CR", "DR"}
    assert seen["rule"] == ((50, 100), "fixed", 0.25) and seen["w"] == 0.25


EXPERIMENTS = (
    "leak sweep leak_forward quickstart wrong_hints wrong_hints_forward hard many_answers chat_logs unsolved "
    "unsolved_leaking unsolved_wrong unsolved_guided unsolved_leaking_guided unsolved_wrong_guided choosing "
    "choosing_surer leak_slow leak_refreshed leak_long quickstart_long"
).split()
# One experiment for each task and each kind of measurement; the others differ in their overrides, which are composed.
DIFFERENT = "leak sweep wrong_hints many_answers chat_logs unsolved_leaking_guided choosing leak_refreshed".split()


def test_the_experiments_are_those_that_the_tests_know(tools):
    assert list(tools("anchored_experiments").EXPERIMENTS) == EXPERIMENTS
    assert set(DIFFERENT) <= set(EXPERIMENTS)


def measured_on(path: Path, records: Iterable[Any]) -> list[Any]:
    """Return all records, or 12 of those on which a model is measured."""
    return list(records)[: 12 if path.name == "held_out.jsonl" else None]


@pytest.mark.full
@pytest.mark.parametrize("name", DIFFERENT)
def test_an_experiment_runs_with_its_base_and_its_last_arm(tools, monkeypatch, tmp_path, name):
    """A base of three steps is measured on 12 problems, and one step is trained; chat logs hold forty conversations."""
    experiments, module = tools("anchored_experiments"), tools("anchored_map")
    from _lib import pretraining

    write = pretraining.write_records
    for place in (pretraining, experiments):
        monkeypatch.setattr(place, "write_records", lambda path, records: write(path, measured_on(path, records)))
    load_example = experiments._example
    chats = load_example("08_chat_logs")
    chats.NUM_SESSIONS = 40
    monkeypatch.setattr(experiments, "_example", lambda of: chats if of == "08_chat_logs" else load_example(of))
    experiment = experiments.EXPERIMENTS[name]
    short = dataclasses.replace(experiment, task=dataclasses.replace(experiment.task, pretraining_steps=3), steps=(1,))
    *base, last = [arm for arm in module.arms_of(name) if arm in ("base", list(experiment.arms)[-1])]
    for arm in (*base, last):
        module.run_cell(experiments.Cell(short, arm, 11), tmp_path / "lines.jsonl", tmp_path / "runs")
    line = module.read_lines(tmp_path / "lines.jsonl")[-1]
    assert line["arm"] == last and line["step"] == [1]
    assert set(line["leak"][0]) == {"AS", "BS", "CS", "DS"} if name == "sweep" else 0 <= line["sampled"][0] <= 1


def test_an_anchor_follows_every_hundred_steps_or_as_an_average(tools):
    module, calls = tools("refreshed_anchors"), []
    frozen = SimpleNamespace(weights="frozen", copy_student=lambda: calls.append(step))
    learner = SimpleNamespace(teacher=frozen, reference=frozen)
    for step in range(2 * module.EVERY + 1):
        module.refresh(SimpleNamespace(learner=learner), step)
    assert calls == [module.EVERY, 2 * module.EVERY]
    averaged, first = SimpleNamespace(weights="ema"), object()
    learner = SimpleNamespace(teacher=averaged, reference=first)
    module.follow_average(SimpleNamespace(learner=learner), 1)
    assert learner.reference is first, "the trainer has built a frozen copy, which a later step would go back to"
    module.follow_average(SimpleNamespace(learner=learner), 0)
    assert learner.reference is averaged


def entropy(logit: float) -> float:
    """Return the entropy of a fork in nats, in float64."""
    q = torch.tensor([logit, 0.0], dtype=torch.float64).log_softmax(0)
    return -(q.exp() * q).sum().item()


def target_of_fork(own: float, hint: float, rule: str, weight: float) -> float:
    """Return the share of the leak under the anchored target, with k found by bisection in float64."""
    t, s = (torch.tensor([p, 1 - p], dtype=torch.float64).log() for p in (hint, own))
    mix = weight * t + s
    difference, k = (mix[0] - mix[1]).item(), 1 + weight
    if rule == "matched":
        wanted, low, high = entropy((s[0] - s[1]).item()), 1e-6, 1e6
        for _ in range(200):
            middle = math.sqrt(low * high)
            low, high = (middle, high) if entropy(difference / middle) < wanted else (low, middle)
        k = min(k, math.sqrt(low * high))
    return (mix / k).softmax(0)[0].item()


@pytest.mark.parametrize("rule", ["fixed", "matched"])
@pytest.mark.parametrize("weight", [0.25, 0.75, 2])
def test_the_closed_form_of_a_fork_is_the_target(tools, rule, weight):
    form = tools("leak_sweep").target_leak
    for own in (0.01, 0.1, 0.3, 0.6):
        for hint in (0.2, 0.5, 0.7, 0.99):
            expected = target_of_fork(own, hint, rule, weight)
            assert form(own, hint, rule, weight) == pytest.approx(expected, abs=1e-6), (own, hint)


def test_the_match_flips_where_w_passes_the_ratio_of_the_logits(tools):
    form, logit = tools("leak_sweep").target_leak, tools("leak_sweep").logit
    flip = abs(logit(0.1)) / logit(0.99)
    assert flip == pytest.approx(0.478, abs=1e-3)
    assert form(0.1, 0.99, "matched", flip - 0.01) == pytest.approx(0.1)
    assert form(0.1, 0.99, "matched", flip + 0.01) == pytest.approx(0.9)


def line_of(arm: str, seed: int, *sampled: float) -> dict:
    """Return a line with the sampled accuracies of some steps, 50 steps apart."""
    figures = {"greedy": [1.0], "shows_work": [0.5], "entropy": [0.0512]}
    return {
        "arm": arm,
        "seed": seed,
        "step": [50 * (i + 1) for i in range(len(sampled))],
        "sampled": list(sampled),
        **figures,
    }


def test_a_table_has_mean_lowest_and_highest_of_the_seeds_that_have_all_arms(tools):
    module = tools("anchored_tables")
    lines = [line_of("base", 11, 0.3), line_of("student_matched", 11, 0.9, 0.2), line_of("base", 12, 0.4)]
    lines += [line_of("student_matched", 12, 0.3, 0.5), line_of("student_matched", 13, 1.0, 1.0)]
    heading, _, before, matched = module.table(module.complete(lines, ["base", "student_matched"]), module.USUAL)
    assert heading.startswith("| step 100, seeds 11, 12 | greedy |")
    assert before == "| before | 1.00 [1.00 1.00] | .35 [.30 .40] | .50 [.50 .50] | .051 [.051 .051] |  |  |"
    assert matched.endswith("| .35 [.20 .50] | .50 [.50 .50] | .051 [.051 .051] | .70 [.50 .90] | 50 to 100 |")


def test_the_flips_are_the_weights_at_which_the_closed_form_passes_a_half(tools):
    form, rows = tools("leak_sweep").target_leak, tools("anchored_tables").flips()[2:]
    for own, row in zip((0.01, 0.03, 0.1, 0.3), rows, strict=True):
        for hint, cell in zip((0.7, 0.9, 0.99), row.split("|")[2:5], strict=True):
            flip = float(cell)
            assert form(own, hint, "matched", flip - 0.01) < 0.5 < form(own, hint, "matched", flip + 0.01)


def test_every_arm_has_a_label(tools):
    module, experiments = tools("anchored_map"), tools("anchored_experiments").EXPERIMENTS
    arms = {arm for name in experiments if name != "sweep" for arm in module.arms_of(name)}
    assert arms == set(tools("anchored_tables").NAMES)


def test_a_table_without_lines_is_an_error(tools):
    with pytest.raises(ValueError, match="has a table leak"):
        tools("anchored_tables").rows_of("leak", [])
