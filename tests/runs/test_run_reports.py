# Copyright (c) 2026 the megatron_selfdistill authors. Apache-2.0.
"""A whole run leaves its events, held-out and explored responses and its report, and no number depends on the pages."""

from __future__ import annotations

import json
import math
import shutil
from collections.abc import Callable

import pytest
from reported_runs import blocks_of
from tiers import combinations
from tiny_run import reproducible_metrics, train

from megatron_selfdistill.instruments.explorer.target_page import explored_files, forget_explored_after, read_explored
from megatron_selfdistill.metrics.run_log import read_evaluation_samples, read_events, read_metrics, read_samples

TARGETS = {
    "reference": ["teacher.weights=ema"],
    "student": ["target.anchor=student", "target.teacher_weight=2"],
    "controls": ["target.control=other", "target.num_controls=2", "target.anchor=student"],
}
SHOWN = ["report.every=1", "metrics.explore_samples=2"]


@pytest.fixture(scope="module")
def of(data) -> Callable[..., list[str]]:
    """Return a function to the options of a run that is evaluated twice and shows two samples each time."""
    evaluated = ["evaluation.every=1", "evaluation.limit=4", "evaluation.num_samples=2", "report.num_problems=3"]
    evaluated += [f"evaluation.path={data}/problems.jsonl", "evaluation.verifier=exact_match", "num_steps=2"]
    evaluated += ["metrics.show_samples=2", "metrics.show_samples_every=1", "checkpoint.save_every=1"]
    return lambda *options: [*evaluated, *options]


def test_a_run_writes_its_report_and_trains_as_without_one(runs, of):
    run_dir, plain = runs(*of(*SHOWN, *TARGETS["reference"])), runs(*of(*TARGETS["reference"]))
    assert reproducible_metrics(run_dir) == reproducible_metrics(plain)
    assert not (plain / "explored").exists() and not (plain / "report.html").exists()
    assert [event["event"] for event in read_events(run_dir)] == ["started", "saved", "saved", "finished"]
    blocks = blocks_of((run_dir / "report.html").read_text())
    (run,) = blocks["overview"]["runs"]
    facts = dict(run["facts"])
    assert run["status"] == "2 of 2 steps; the run is complete"
    assert facts["layout"].startswith("TP 1 x PP 1 x CP 1 x DP 1") and "torch" in facts["versions"]
    assert "selfdistill train " in facts["command"] and f"run_dir={run_dir}" in facts["command"]
    kept = read_evaluation_samples(run_dir)
    assert {record["step"] for record in kept} == {1, 2}
    assert {record["sample"] for record in kept} == {None, 0}
    assert len(kept) == 2 * 3 * 2 and len({record["problem_id"] for record in kept}) == 3
    assert len(blocks["evaluations"][0]) == len(kept)


@combinations(name=list(TARGETS), quick={"name": ["reference"]})
def test_the_samples_of_evaluated_steps_are_saved_with_the_numbers_of_the_loss(runs, of, name):
    run = runs(*of(*SHOWN, *TARGETS[name]))
    found = [read_explored(path) for path in explored_files(run)]
    assert [record["step"] for record in found] == [1, 1, 2, 2]
    for record, sample in zip(found, read_samples(run), strict=True):
        tokens = record["tokens"]
        for key in ("id", "text", "status"):
            assert tokens[key] == sample["tokens"][key]
        for key in ("loss", "k", "student_log_prob", "teacher_log_prob"):
            assert tokens[key] == pytest.approx(sample["tokens"][key], rel=2e-4, abs=2e-6), key
        for key in ("step", "problem_id", "prompt", "solution", "truncated"):
            assert record[key] == sample[key]


def test_a_run_that_goes_back_forgets_the_explored_responses_of_later_steps(runs, of, tmp_path):
    run = shutil.copytree(runs(*of(*SHOWN, *TARGETS["reference"])), tmp_path / "run")
    for step, left in ((1, 2), (0, 0)):
        forget_explored_after(run, step)
        assert len(explored_files(run)) == left and len(list((run / "explored").iterdir())) == 2 * left


@pytest.mark.full
def test_a_run_that_a_guard_stops_and_one_that_resumes_say_so_and_a_file_in_the_way_is_a_warning(
    ranks, runs, of, tmp_path
):
    run_dir = tmp_path / "run"
    run_dir.mkdir()
    (run_dir / "explored").write_text("a file where the directory should be")
    options = of(*SHOWN, "num_steps=3", "checkpoint.save_every=3")
    guard = ["guards.min_length_ratio=1000", "guards.reference_steps=1", "guards.patience=1"]
    train(ranks, runs.arguments(run_dir, *options, *guard), expected=3)
    train(ranks, runs.arguments(run_dir, *options))
    assert all(math.isfinite(line["loss/mean"]) for line in read_metrics(run_dir) if "loss/mean" in line)
    events = read_events(run_dir)
    assert [event["event"] for event in events] == ["started", "saved", "guard", "started", "saved", "finished"]
    assert events[2]["step"] == 2 and "length collapse" in events[2]["reason"]
    assert events[3]["step"] == 2 and events[3]["start"].startswith("resumes ")
    steps = [json.loads(line)["step"] for line in (run_dir / "evaluation_samples.jsonl").read_text().splitlines()]
    assert sorted(set(steps)) == [1, 3] and len(steps) == 12
