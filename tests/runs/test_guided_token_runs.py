# Copyright (c) 2026 the megatron_selfdistill authors. Apache-2.0.
"""Whole runs in which guided problems have their own weight of the teacher and their own divergence."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest
from tiny_run import assert_resumes_equal, overrides, reproducible_metrics, starts_with_an_even_token, train

from _lib import subtraction

OWN = ["target.guided_teacher_weight=2", "loss.guided_divergence=forward_kl"]
OPTIONS = ["target.anchor=reference", "rollout.guidance=mixed", "metrics.show_samples=0", *OWN]
GUIDED_BELOW = ["rollout.guide_below=0.5", "evaluation.verifier=tiny_run.starts_with_an_even_token"]


@pytest.fixture(scope="module")
def arguments(data, tmp_path_factory) -> Callable[[Path], list[str]]:
    """Return the arguments of a run on 8 problems, which are guided where the student fails, by its directory."""
    problems = tmp_path_factory.mktemp("guided") / "problems.jsonl"
    problems.write_text("".join((data / "problems.jsonl").read_text().splitlines(keepends=True)[:8]))
    options = [*OPTIONS, *GUIDED_BELOW, f"data.path={problems}", "num_steps=2", "checkpoint.save_every=1"]
    return lambda run_dir: overrides(data, run_dir, *options, "target.rule=fixed", "model.num_layers=4")


@pytest.fixture(scope="module")
def whole(ranks, arguments, tmp_path_factory) -> Path:
    run = tmp_path_factory.mktemp("whole") / "run"
    train(ranks, [*arguments(run), f"tests.record={run}/recorded.jsonl"])
    return run


def test_guided_and_plain_problems_share_a_batch(whole):
    """With rule=fixed, k is 1 + w of each token, so that its mean counts the guided tokens.

    A problem is guided if its first response was wrong; there are 8 problems, so each is visited at every step.
    """
    tokens, right = {step: {True: 0, False: 0} for step in range(2)}, {}
    for record in map(json.loads, (whole / "recorded.jsonl").read_text().splitlines()):
        guided = record["teacher_log_probs"] is not None
        tokens[record["step"]][guided] += len(record["token_ids"])
        text = "".join(subtraction.TASK.alphabet[token] for token in record["token_ids"][:-1])
        is_right = record["finish_reason"] == "stop" and starts_with_an_even_token(text, None)
        assert record["step"] == 0 or guided is not right[record["problem_id"]]
        right.setdefault(record["problem_id"], is_right)
    lines = reproducible_metrics(whole)
    for line, counts in zip(lines, tokens.values(), strict=True):
        mean = (3.0 * counts[True] + 1.75 * counts[False]) / sum(counts.values())
        assert line["k/mean"] == pytest.approx(mean, rel=1e-6)
    assert tokens[0][True] == 0 and 0 < tokens[1][True] < sum(tokens[1].values())
    assert lines[0]["loss/mean"] == pytest.approx(lines[0]["loss/reverse_kl"], rel=1e-6)
    assert lines[1]["loss/mean"] != pytest.approx(lines[1]["loss/reverse_kl"], rel=1e-4)


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


@pytest.mark.full
def test_one_k_per_step_is_in_proportion_to_1_plus_w_of_the_guided_tokens(ranks, data, tmp_path):
    """All problems are guided; the first step has k = 1 + w, and the second a k that was solved."""
    train(ranks, overrides(data, tmp_path / "run", *OPTIONS, "target.rule=batch", "num_steps=2"))
    first, second = reproducible_metrics(tmp_path / "run")
    assert first["k/mean"] == pytest.approx(3.0)
    assert second["k/mean"] < 3.0 - 1e-3 and second["k/p99"] - second["k/p01"] < 0.02 * second["k/mean"]
