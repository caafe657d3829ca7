# Copyright (c) 2026 the megatron_selfdistill authors. Apache-2.0.
"""The recipes side by side: rows have equal budgets and keep what is published; the figures are those of the logs."""

from __future__ import annotations

import dataclasses
import json
import re
from pathlib import Path
from types import ModuleType

import pytest

from _lib import additions, calculator, pretraining, subtraction
from _lib.measurement import Measurement
from _lib.variants import Outcome, Variant
from megatron_selfdistill import config as configuration

pytestmark = pytest.mark.full


@pytest.fixture(scope="module")
def example(load_example) -> ModuleType:
    return load_example("10_recipes")


@pytest.fixture(scope="module")
def composed(example) -> dict[str, configuration.Config]:
    """Return the configuration of each row on additions."""
    block = example.BLOCKS["additions"]
    given = (*block.task.overrides, "data.path=problems", "data.tokenizer=tokenizer", "checkpoint.load=base")
    return {
        name: configuration.load([*given, *example.overrides_of(name, block)], "quickstart") for name in example.ROWS
    }


def test_all_rows_have_the_same_budget_and_optimizer(example, composed):
    plain = composed["default"]
    for name, config in composed.items():
        assert config.data.global_batch_size * config.rollout.num_samples * example.ROWS[name].turns == 32, name
        assert config.optimizer == plain.optimizer and config.optimizer.lr == 3e-4, name
        assert config.data.teacher_template == plain.data.teacher_template == "{problem}H{solution}|", name
        assert config.rollout.temperature == 1 and config.rollout.max_new_tokens == 8, name
    runs = [
        (configuration.to_yaml(config), example.ROWS[name].records, example.ROWS[name].teacher)
        for name, config in composed.items()
    ]
    assert len(set(runs)) == len(runs), "two rows are the same run"


def test_rows_keep_what_their_recipe_publishes(composed):
    assert composed["sdft"].teacher.ema_decay == 0.99 and composed["sdft"].loss.skip_first_tokens == 3
    assert composed["sdpo"].loss.divergence == "jsd" and composed["sdpo"].method.hints == "peer"
    assert composed["opsd_rl"].method.distill_weight == 0.25 and composed["opsd_rl"].teacher.weights == "current"
    assert composed["scope"].loss.normalize == "prompts" and composed["uni_opd"].method.clip_high == 0.28
    for name in ("sdpo", "opsd_rl"):
        mix, alone = composed[f"{name}_mix"], composed[name]
        assert mix.target == composed["default"].target != alone.target
        assert dataclasses.replace(mix, target=alone.target) == alone


def test_a_row_says_whether_it_has_a_teacher(example, composed):
    for name, row in example.ROWS.items():
        assert row.sees.startswith("no teacher") == (not composed[name].has_teacher), name
        problems, samples = composed[name].data.global_batch_size, composed[name].rollout.num_samples
        assert row.budget == f"{problems} x {samples * row.turns}"


def outcome_of(run_dir: Path, metrics: list[dict]) -> Outcome:
    """Return the outcome of a run with these lines in its metrics.jsonl."""
    run_dir.mkdir(exist_ok=True)
    (run_dir / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in metrics))
    measurement = Measurement(0.9, 0.8, 1.0, 0.99, 0.1, 1.0, 22.0, 1.0, 0.0, 0.1, 0.1, 0.5, ())
    return Outcome(Variant("any"), run_dir, 0, 9.0, 5.0, measurement)


def test_figures_are_means_and_sums_of_the_logged_metrics(example, tmp_path):
    steps = [
        {"step": i + 1, "tokens/rollout": 100.0, "rewards/trained_share": share, "hints/share": share}
        for i, share in enumerate((0.25, 0.5, 0.75, 1.0))
    ]
    evaluations = [
        {"step": i + 1, "evaluation/greedy_accuracy": 0.1 * i, "evaluation/sampled_accuracy": 0.2 * i} for i in range(4)
    ]
    logged = [line for pair in zip(steps, evaluations, strict=True) for line in pair]
    found = example.figures("sdpo", outcome_of(tmp_path, logged))
    assert found["trained"] == found["with_hint"] == 0.625
    assert found["tokens"] == 400 and found["cpu_seconds"] == 5.0 and found["greedy"] == 0.9
    assert found["step"] == [1, 2, 3, 4] and found["sampled_by_step"] == [0.0, 0.2, 0.4, pytest.approx(0.6)]
    assert (found["sampled_at_quarter"], found["sampled_at_half"]) == (0.0, 0.2)


def test_rows_without_such_metrics_train_on_all_responses_and_have_a_hint_if_a_teacher(example, tmp_path):
    evaluated = {"step": 1, "evaluation/greedy_accuracy": 0.0, "evaluation/sampled_accuracy": 0.0}
    logged = [{"step": 1, "tokens/rollout": 7.0}, evaluated]
    of_run = outcome_of(tmp_path, logged)
    assert [example.figures("default", of_run)[key] for key in ("trained", "with_hint", "tokens")] == [1.0, 1.0, 7.0]
    assert [example.figures("sft", of_run)[key] for key in ("trained", "with_hint", "tokens")] == [1.0, None, 0]


def test_a_run_with_an_environment_has_the_rewards_of_its_steps_by_quarter(example, tmp_path):
    logged = [{"step": i + 1, "episodes/reward_mean": float(i >= 20)} for i in range(40)]
    found = example.figures("sod", outcome_of(tmp_path, logged))
    assert found["step"] == [10, 20, 30, 40] and found["sampled_by_step"] == [0.0, 0.0, 1.0, 1.0]
    assert (found["sampled_at_quarter"], found["sampled_at_half"], found["greedy_by_step"]) == (0.0, 0.0, [])


@pytest.mark.full
@pytest.mark.parametrize("name", ["default", "sod"])
def test_an_episode_of_the_calculator_is_trained_on_and_measured(load_example, root, name):
    example = load_example("10_recipes")
    few = dataclasses.replace(calculator.TASK, held_out_problems=lambda: subtraction.held_out_problems()[:8])
    block = dataclasses.replace(example.BLOCKS["calculator"], task=dataclasses.replace(few, pretraining_steps=20))
    base = pretraining.make_base(block.task, 5, root / "bases")
    problems = pretraining.write_records(root / "calculator.jsonl", block.task.training_problems(5))
    figures = example.figures(name, example.run(name, block, base, problems, root, 4))
    assert figures["step"][-1] == 4 and len(figures["sampled_by_step"]) == 4
    assert 1 <= figures["length"] <= 4 and 0 <= figures["sampled"] <= figures["pass_at_8"] <= 1


@pytest.mark.full
def test_the_recipes_run_to_their_end(load_example, root, monkeypatch, capsys):
    example = load_example("10_recipes")
    few = dataclasses.replace(additions.TASK, held_out_problems=lambda: additions.held_out_problems()[:8])
    block = dataclasses.replace(
        example.BLOCKS["additions"], task=dataclasses.replace(few, pretraining_steps=20), num_measured=8
    )
    monkeypatch.setitem(example.BLOCKS, "additions", block)
    names = list(block.rows)[::2]  # of the others, test_literature_runs.py makes whole runs
    assert example.main(["--block", "additions", "--steps", "2", "--only", *names, "--directory", str(root)]) == 0
    shown = capsys.readouterr().out
    for row in (example.ROWS[name] for name in names):
        assert len(re.findall(rf"│ {re.escape(row.title)} +│", shown)) == 2, row.title
