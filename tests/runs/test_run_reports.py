# Copyright (c) 2026 the megatron_selfdistill authors. Apache-2.0.
"""A whole run leaves its events, its held-out responses and its report, and numbers do not depend on the report."""

from __future__ import annotations

import json

from reported_runs import blocks_of
from tiny_run import overrides, train, train_each

from megatron_selfdistill.metrics.run_log import read_evaluation_samples, read_events, read_metrics

NOISY = ("seconds/", "tokens_per_second/", "memory/")


def evaluated(data):
    return [
        f"evaluation.path={data}/problems.jsonl",
        "evaluation.every=2",
        "evaluation.limit=4",
        "evaluation.verifier=exact_match",
        "evaluation.num_samples=2",
        "report.num_problems=3",
        "num_steps=4",
        "checkpoint.save_every=2",
    ]


def numbers(run_dir):
    return [{k: v for k, v in line.items() if not k.startswith(NOISY)} for line in read_metrics(run_dir)]


def test_a_run_writes_its_report_and_trains_as_without_one(ranks, data, tmp_path):
    with_report, without = tmp_path / "with", tmp_path / "without"
    shared = evaluated(data)
    train_each(
        ranks,
        [overrides(data, with_report, *shared, "report.every=1"), overrides(data, without, *shared, "report.every=0")],
    )
    assert numbers(with_report) == numbers(without)
    assert not (without / "report.html").exists()
    assert [event["event"] for event in read_events(with_report)] == ["started", "saved", "saved", "finished"]
    blocks = blocks_of((with_report / "report.html").read_text())
    (run,) = blocks["overview"]["runs"]
    facts = dict(run["facts"])
    assert run["status"] == "4 of 4 steps; the run is complete"
    assert facts["layout"].startswith("TP 1 x PP 1 x CP 1 x DP 1") and "torch" in facts["versions"]
    assert "selfdistill train " in facts["command"] and f"run_dir={with_report}" in facts["command"]
    kept = read_evaluation_samples(with_report)
    assert {record["step"] for record in kept} == {2, 4}
    assert {record["sample"] for record in kept} == {None, 0}
    assert len(kept) == 2 * 3 * 2 and len({record["problem_id"] for record in kept}) == 3
    assert len(blocks["evaluations"][0]) == len(kept)


def test_a_run_that_a_guard_stops_and_one_that_resumes_say_so(ranks, data, tmp_path):
    run_dir = tmp_path / "run"
    arguments = overrides(data, run_dir, *evaluated(data))
    train(
        ranks, [*arguments, "guards.min_length_ratio=1000", "guards.reference_steps=1", "guards.patience=1"], expected=3
    )
    train(ranks, [*arguments, "guards.min_length_ratio=null"])
    names = [event["event"] for event in read_events(run_dir)]
    assert names == ["started", "saved", "guard", "started", "saved", "finished"]
    stopped, resumed = read_events(run_dir)[2:4]
    assert stopped["step"] == 2 and "length collapse" in stopped["reason"]
    assert resumed["step"] == 2 and resumed["start"].startswith("resumes ")
    steps = [json.loads(line)["step"] for line in (run_dir / "evaluation_samples.jsonl").read_text().splitlines()]
    assert sorted(set(steps)) == [4] and len(steps) == 6
