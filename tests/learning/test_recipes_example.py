# Copyright (c) 2026 the megatron_selfdistill authors. Apache-2.0.
"""The recipes side by side: rows have equal budgets, keep what is published, and run to their ends."""

from __future__ import annotations

import dataclasses
import re
from types import ModuleType

import pytest

from _lib import additions, calculator, pretraining, subtraction
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
        assert mix.target == dataclasses.replace(composed["default"].target, anchor="reference") != alone.target
        assert dataclasses.replace(mix, target=alone.target) == alone


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
