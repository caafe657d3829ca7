# Copyright (c) 2026 the megatron_selfdistill authors. Apache-2.0.
"""A whole run leaves its events, held-out and explored responses and its report, and no number depends on the pages."""

from __future__ import annotations

import json
import math
import shutil
from pathlib import Path

import pytest
import tiny_run
from reported_runs import blocks_of
from tiny_run import overrides, reproducible_metrics, train, train_each

from megatron_selfdistill.instruments.explorer.target_page import explored_files, forget_explored_after, read_explored
from megatron_selfdistill.metrics.run_log import read_evaluation_samples, read_events, read_metrics, read_samples

TARGETS = {
    "student": ["target.anchor=student", "target.teacher_weight=2"],
    "reference": ["teacher.weights=ema"],
    "controls": ["target.control=other", "target.num_controls=2", "target.anchor=student"],
}
SHOWN = ["report.every=1", "metrics.explore_samples=2"]
NOT_SHOWN = ["report.every=0", "metrics.explore_samples=0"]


def arguments(data: Path, run_dir: Path, *more: str) -> list[str]:
    evaluated = ["evaluation.every=2", "evaluation.limit=4", "evaluation.num_samples=2", "report.num_problems=3"]
    evaluated += [f"evaluation.path={data}/problems.jsonl", "evaluation.verifier=exact_match"]
    evaluated += ["metrics.show_samples=2", "metrics.show_samples_every=2"]
    return overrides(data, run_dir, *evaluated, "num_steps=4", "checkpoint.save_every=2", *more)


@pytest.fixture(scope="module")
def runs(ranks, data, tmp_path_factory) -> Path:
    """Return a directory with a run per target, and one that shows nothing."""
    root = tmp_path_factory.mktemp("reported")
    shown = [arguments(data, root / name, *SHOWN, *options) for name, options in TARGETS.items()]
    train_each(ranks, [*shown, arguments(data, root / "plain", *NOT_SHOWN, *TARGETS["reference"])])
    return root


def test_a_run_writes_its_report_and_trains_as_without_one(runs):
    run_dir, plain = runs / "reference", runs / "plain"
    assert reproducible_metrics(run_dir) == reproducible_metrics(plain)
    assert not (plain / "explored").exists() and not (plain / "report.html").exists()
    assert [event["event"] for event in read_events(run_dir)] == ["started", "saved", "saved", "finished"]
    blocks = blocks_of((run_dir / "report.html").read_text())
    (run,) = blocks["overview"]["runs"]
    facts = dict(run["facts"])
    assert run["status"] == "4 of 4 steps; the run is complete"
    assert facts["layout"].startswith("TP 1 x PP 1 x CP 1 x DP 1") and "torch" in facts["versions"]
    assert "selfdistill train " in facts["command"] and f"run_dir={run_dir}" in facts["command"]
    kept = read_evaluation_samples(run_dir)
    assert {record["step"] for record in kept} == {2, 4}
    assert {record["sample"] for record in kept} == {None, 0}
    assert len(kept) == 2 * 3 * 2 and len({record["problem_id"] for record in kept}) == 3
    assert len(blocks["evaluations"][0]) == len(kept)


@pytest.mark.parametrize("name", TARGETS)
def test_the_samples_of_evaluated_steps_are_saved_with_the_numbers_of_the_loss(runs, name):
    found = [read_explored(path) for path in explored_files(runs / name)]
    assert [record["step"] for record in found] == [2, 2, 4, 4]
    samples = [sample for sample in read_samples(runs / name) if sample["step"] == 2]
    for record, sample in zip(found[:2], samples, strict=True):
        tokens = record["tokens"]
        for key in ("id", "text", "status"):
            assert tokens[key] == sample["tokens"][key]
        for key in ("loss", "k", "student_log_prob", "teacher_log_prob"):
            assert tokens[key] == pytest.approx(sample["tokens"][key], rel=2e-4, abs=2e-6), key
        for key in ("problem_id", "prompt", "solution", "truncated"):
            assert record[key] == sample[key]


@pytest.mark.full
def test_a_resumed_run_forgets_what_it_repeats(ranks, data, runs, tmp_path):
    shutil.copytree(runs / "student", tmp_path / "run")
    before = {path.name: path.read_bytes() for path in explored_files(tmp_path / "run")}
    tiny_run.go_back_to_step(2, tmp_path / "run")
    for path in explored_files(tmp_path / "run")[2:]:
        path.with_name(path.name.replace(".json.gz", ".html")).write_text("a page")
        path.write_bytes(b"a leftover")
    train(ranks, arguments(data, tmp_path / "run", *SHOWN, *TARGETS["student"], "report.every=0"))
    assert {path.name: path.read_bytes() for path in explored_files(tmp_path / "run")} == before
    assert not list((tmp_path / "run" / "explored").glob("step_0000004*.html"))
    forget_explored_after(tmp_path / "run", 0)
    assert explored_files(tmp_path / "run") == []


def test_a_run_that_a_guard_stops_and_one_that_resumes_say_so_and_a_file_in_the_way_is_a_warning(ranks, data, tmp_path):
    run_dir = tmp_path / "run"
    run_dir.mkdir()
    (run_dir / "explored").write_text("a file where the directory should be")
    run = arguments(data, run_dir, *SHOWN)
    guard = ["guards.min_length_ratio=1000", "guards.reference_steps=1", "guards.patience=1"]
    train(ranks, [*run, *guard], expected=3)
    train(ranks, [*run, "guards.min_length_ratio=null"])
    assert all(math.isfinite(line["loss/mean"]) for line in read_metrics(run_dir) if "loss/mean" in line)
    names = [event["event"] for event in read_events(run_dir)]
    assert names == ["started", "saved", "guard", "started", "saved", "finished"]
    stopped, resumed = read_events(run_dir)[2:4]
    assert stopped["step"] == 2 and "length collapse" in stopped["reason"]
    assert resumed["step"] == 2 and resumed["start"].startswith("resumes ")
    steps = [json.loads(line)["step"] for line in (run_dir / "evaluation_samples.jsonl").read_text().splitlines()]
    assert sorted(set(steps)) == [4] and len(steps) == 6
