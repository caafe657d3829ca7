# Copyright (c) 2026 the megatron_selfdistill authors. Apache-2.0.
"""The recipes side by side: rows have equal budgets, and run to their ends."""

from __future__ import annotations

import dataclasses
import json
import re
from types import ModuleType

import pytest

from _lib import additions, calculator, checked_subtraction, pretraining, row_records, subtraction
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


OF_CHECKER = ["sdpo_feedback", "rltf_fm", "skill_sd", "skald", "openclaw", "ovd", "rlt", "explained"]


@pytest.mark.parametrize(
    ("name", "task"),
    [("default", calculator), ("sod", calculator), *((name, checked_subtraction) for name in OF_CHECKER)],
)
def test_a_recipe_on_episodes_or_whose_base_is_asked_is_trained_and_measured(example, root, monkeypatch, name, task):
    monkeypatch.setattr(row_records.subtraction, "NUM_TRAINING", 64)
    kind, num_steps = ("calculator", 4) if task is calculator else ("checked", 2)
    few = dataclasses.replace(task.TASK, held_out_problems=lambda: subtraction.held_out_problems()[:8])
    few = dataclasses.replace(few, pretraining_steps=20 if task is calculator else 150)
    base = pretraining.make_base(few, 5, root / "bases")
    problems = pretraining.write_records(root / f"{kind}.jsonl", few.training_problems(5)[:64])
    outcome = example.run(name, dataclasses.replace(example.BLOCKS[kind], task=few), base, problems, root, num_steps)
    figures = example.figures(name, outcome)
    assert figures["step"][-1] == num_steps and 0 <= figures["sampled"] <= figures["pass_at_8"] <= 1
    if task is calculator:
        assert len(figures["sampled_by_step"]) == num_steps and 1 <= figures["length"] <= 4
    if name in ("rlt", "explained"):
        explained = [json.loads(line) for line in (root / f"{name}.jsonl").read_text().splitlines()]
        assert explained and all(line["solution"].endswith(f";{line['answer']}") for line in explained)
        assert (root / "rlt_teacher").exists() or name == "explained"


def test_the_recipes_run_to_their_end(example, root, monkeypatch, capsys):
    few = dataclasses.replace(additions.TASK, held_out_problems=lambda: additions.held_out_problems()[:8])
    few = dataclasses.replace(few, pretraining_steps=20)
    block = dataclasses.replace(example.BLOCKS["additions"], task=few, num_measured=8)
    monkeypatch.setitem(example.BLOCKS, "additions", block)
    names = list(block.rows)[::2]  # of the others, test_literature_runs.py makes whole runs
    assert example.main(["--block", "additions", "--steps", "2", "--only", *names, "--directory", str(root)]) == 0
    shown = capsys.readouterr().out
    for row in (example.ROWS[name] for name in names):
        assert len(re.findall(rf"│ {re.escape(row.title)} +│", shown)) == 2, row.title
