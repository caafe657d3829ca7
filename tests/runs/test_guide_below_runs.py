# Copyright (c) 2026 the megatron_selfdistill authors. Apache-2.0.
"""Whole runs that guide only the problems that the student fails, and that go on where they stopped."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest
from tiny_run import assert_resumes_equal, overrides, reproducible_metrics, starts_with_an_even_token, train

from _lib import subtraction

GUIDED_BELOW = [
    *("rollout.guidance=mixed", "rollout.guide_below=0.5", "evaluation.verifier=tiny_run.starts_with_an_even_token"),
    *("target.teacher_weight=2", "loss.divergence=forward_kl", "target.anchor=reference", "metrics.show_samples=0"),
]


@pytest.fixture(scope="module")
def arguments(data, tmp_path_factory) -> Callable[[Path], list[str]]:
    """Return the arguments of a run on 8 problems, which are guided where the student fails, by its directory."""
    problems = tmp_path_factory.mktemp("guided") / "problems.jsonl"
    problems.write_text("".join((data / "problems.jsonl").read_text().splitlines(keepends=True)[:8]))
    options = [*GUIDED_BELOW, f"data.path={problems}", "num_steps=2", "checkpoint.save_every=1", "model.num_layers=4"]
    return lambda run_dir: overrides(data, run_dir, *options)


@pytest.fixture(scope="module")
def whole(ranks, arguments, tmp_path_factory) -> Path:
    run = tmp_path_factory.mktemp("whole") / "run"
    train(ranks, [*arguments(run), f"tests.record={run}/recorded.jsonl"])
    return run


def test_guided_and_plain_problems_share_a_batch(whole):
    """A problem is guided if its first response was wrong; there are 8 problems, so each is visited at every step."""
    kinds, right = {step: [] for step in range(2)}, {}
    for record in map(json.loads, (whole / "recorded.jsonl").read_text().splitlines()):
        guided = record["teacher_log_probs"] is not None
        kinds[record["step"]].append(guided)
        text = "".join(subtraction.TASK.alphabet[token] for token in record["token_ids"][:-1])
        is_right = record["finish_reason"] == "stop" and starts_with_an_even_token(text, None)
        assert record["step"] == 0 or guided is not right[record["problem_id"]]
        right.setdefault(record["problem_id"], is_right)
    first, second = reproducible_metrics(whole)
    assert not any(kinds[0]) and "guided/share" not in first
    assert 0 < second["guided/share"] == sum(kinds[1]) / len(kinds[1]) < 1


def test_a_resumed_run_guides_the_same_problems(ranks, arguments, whole):
    assert_resumes_equal(ranks, whole, arguments, step=1, num_steps=2)


def test_a_resumed_run_guides_from_the_same_target_with_controls(ranks, data, tmp_path):
    options = ["target.anchor=student", "target.control=other", "target.num_controls=2", "rollout.guidance=mixed"]

    def arguments(run_dir: Path, *more: str) -> list[str]:
        return overrides(data, run_dir, *options, "num_steps=2", "checkpoint.save_every=1", *more)

    def tokens(name: str, *more: str) -> list[list[int]]:
        train(ranks, arguments(tmp_path / name, f"tests.record={tmp_path}/{name}.jsonl", *more))
        records = map(json.loads, (tmp_path / f"{name}.jsonl").read_text().splitlines())
        return [record["token_ids"] for record in records if record["step"] == 0]

    guided = tokens("whole")
    assert_resumes_equal(ranks, tmp_path / "whole", arguments, step=1, num_steps=2)
    assert guided != tokens("without", "target.control=none", "num_steps=1")
