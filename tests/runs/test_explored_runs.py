# Copyright (c) 2026 the megatron_selfdistill authors. Apache-2.0.
"""Runs save responses for the target explorer at evaluations: the same in every layout, and never in a run's way."""

from __future__ import annotations

import math
import shutil
from pathlib import Path
from typing import Any

import pytest
import tiny_run
from tiny_run import NOT_REPRODUCIBLE, overrides, train, train_each

from megatron_selfdistill.instruments.explorer.target_page import (
    explored_files,
    forget_explored_after,
    read_explored,
)
from megatron_selfdistill.metrics.run_log import read_metrics, read_samples

OPTIONS = [
    *("model.num_layers=2", "num_steps=3", "metrics.show_samples=2", "metrics.show_samples_every=2"),
    *("evaluation.every=2", "evaluation.limit=4", "evaluation.verifier=exact_match", "metrics.explore_samples=2"),
    "checkpoint.save_every=2",
]
TARGETS = {"student": ["target.anchor=student", "target.teacher_weight=2"], "reference": ["teacher.weights=ema"]}


def arguments(data: Path, run_dir: Path, *more: str) -> list[str]:
    return overrides(data, run_dir, *OPTIONS, f"evaluation.path={data}/problems.jsonl", *more)


@pytest.fixture(scope="module")
def runs(ranks, data, tmp_path_factory) -> Path:
    """Return a directory with a run per target, and one that saves nothing for the explorer."""
    directory = tmp_path_factory.mktemp("explored")
    each = [arguments(data, directory / name, *options) for name, options in TARGETS.items()]
    train_each(ranks, [*each, arguments(data, directory / "none", *TARGETS["reference"], "metrics.explore_samples=0")])
    return directory


def records(run_dir: Path) -> list[dict[str, Any]]:
    return [read_explored(path) for path in explored_files(run_dir)]


@pytest.mark.parametrize("name", TARGETS)
def test_the_samples_of_evaluated_steps_are_saved_with_the_numbers_of_the_loss(runs, name):
    found = records(runs / name)
    assert [path.name[:14] for path in explored_files(runs / name)] == [
        "step_0000002_1",
        "step_0000002_2",
        "step_0000003_1",
        "step_0000003_2",
    ]
    assert [record["step"] for record in found] == [2, 2, 3, 3]
    samples = [sample for sample in read_samples(runs / name) if sample["step"] == 2]
    for record, sample in zip(found[:2], samples, strict=True):
        tokens = record["tokens"]
        for key in ("id", "text", "status"):
            assert tokens[key] == sample["tokens"][key]
        for key in ("loss", "k", "student_log_prob", "teacher_log_prob"):
            assert tokens[key] == pytest.approx(sample["tokens"][key], rel=2e-4, abs=2e-6), key
        for key in ("problem_id", "prompt", "solution", "truncated"):
            assert record[key] == sample[key]


def test_saving_changes_nothing_of_the_run(runs):
    def numbers(name: str) -> list[dict[str, float]]:
        lines = read_metrics(runs / name)
        return [{key: v for key, v in line.items() if not key.startswith(NOT_REPRODUCIBLE)} for line in lines]

    assert numbers("none") == numbers("reference") and not (runs / "none" / "explored").exists()


def test_a_resumed_run_forgets_what_it_repeats(ranks, data, runs, tmp_path):
    shutil.copytree(runs / "student", tmp_path / "run")
    before = {path.name: path.read_bytes() for path in explored_files(tmp_path / "run")}
    tiny_run.go_back_to_step(2, tmp_path / "run")
    for path in explored_files(tmp_path / "run")[2:]:
        path.with_name(path.name.replace(".json.gz", ".html")).write_text("a page")
        path.write_bytes(b"a leftover")
    train(ranks, arguments(data, tmp_path / "run", *TARGETS["student"]))
    assert {path.name: path.read_bytes() for path in explored_files(tmp_path / "run")} == before
    assert not list((tmp_path / "run" / "explored").glob("*.html"))
    forget_explored_after(tmp_path / "run", 0)
    assert explored_files(tmp_path / "run") == []


def test_an_error_while_saving_becomes_a_warning(ranks, data, tmp_path):
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "explored").write_text("a file where the directory should be")
    train(ranks, arguments(data, tmp_path / "run", "num_steps=2"))
    lines = read_metrics(tmp_path / "run")
    assert lines[-1]["step"] == 2 and math.isfinite(lines[0]["loss/mean"])
