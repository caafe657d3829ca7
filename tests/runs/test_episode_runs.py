# Copyright (c) 2026 the megatron_selfdistill authors. Apache-2.0.
"""Whole runs with an environment: resumed, replayed, and with equal texts and terms in every layout."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from tiers import combinations
from tiny_run import assert_resumes_equal, overrides, reproducible_metrics, start_and_listen, train

LAYOUTS = {
    "TP2": ["parallel.tensor_model_parallel_size=2"],
    "CP2": ["parallel.context_parallel_size=2"],
    "PP2": ["parallel.pipeline_model_parallel_size=2"],
    "DP2": [],
}
ENVIRONMENT = ["environment.name=replying.Replying", "environment.max_turns=3"]
NUM_STEPS = 2


def arguments(data: Path, run_dir: Path, *more: str) -> list[str]:
    """Return the arguments of a short run whose episodes have one to three turns, with rewards and a teacher."""
    tiny = overrides(data, run_dir, "data.global_batch_size=4", "rollout.num_samples=2", "rollout.max_new_tokens=10")
    tiny += ["data.on_long_context=drop", "policy.weight=1", "optimizer.lr_warmup_steps=0"]
    return [*tiny, f"num_steps={NUM_STEPS}", "checkpoint.save_every=1", *ENVIRONMENT, *more]


def turns_of(path: Path, step: int) -> dict[tuple[str, int, int], list[int]]:
    """Return the recorded responses of a step: (problem, sample, turn) -> token ids."""
    records = map(json.loads, path.read_text().splitlines())
    return {
        (r["problem_id"], r["sample_index"], r.get("turn", 0)): r["token_ids"] for r in records if r["step"] == step
    }


@pytest.fixture(scope="module")
def start(ranks, data, tmp_path_factory) -> str:
    """Return the override with which all runs start from the same weights: random weights depend on the layout."""
    run = tmp_path_factory.mktemp("base") / "run"
    train(ranks, overrides(data, run, "num_steps=1"))
    return f"checkpoint.load={run}/checkpoints"


@pytest.fixture(scope="module")
def whole(ranks, data, start, tmp_path_factory) -> Path:
    """Return the directory of a finished run on one rank."""
    run = tmp_path_factory.mktemp("episodes") / "run"
    train(ranks, arguments(data, run, start, f"rollout.record={run}/responses.jsonl"))
    return run


def test_episodes_have_different_lengths_and_train(whole):
    first = turns_of(whole / "responses.jsonl", step=0)
    assert {turn for _, _, turn in first} == {0, 1, 2}
    for step in reproducible_metrics(whole):
        assert step["gradient_norm"] > 0 and "rewards/mean" in step
        assert 1 < step["episodes/turns_mean"] < 3 and step["episodes/reward_mean"] > 0
        assert step["rewards/trained_share"] == 1.0


def test_a_run_with_episodes_resumes_bit_for_bit(ranks, data, start, whole):
    assert_resumes_equal(ranks, whole, lambda run: arguments(data, run, start), step=1, num_steps=NUM_STEPS)


@combinations(layout=list(LAYOUTS), quick={"layout": ["DP2"]}, strength=1)
def test_layouts_sample_the_same_episodes_and_have_equal_terms(ranks, data, start, whole, tmp_path, layout):
    run, record = tmp_path / "run", tmp_path / "responses.jsonl"
    train(ranks, arguments(data, run, start, f"rollout.record={record}", *LAYOUTS[layout]), 2)
    assert turns_of(record, step=0) == turns_of(whole / "responses.jsonl", step=0)
    replay = f"rollout.replay={whole}/responses.jsonl"
    train(ranks, arguments(data, tmp_path / "replayed", start, replay, *LAYOUTS[layout]), 2)
    for expected, found in zip(reproducible_metrics(whole), reproducible_metrics(tmp_path / "replayed"), strict=True):
        compared = [key for key in expected if key.startswith(("terms/", "rewards/", "episodes/", "loss/"))]
        for key in compared:
            assert found[key] == pytest.approx(expected[key], abs=2e-5), key
        assert found["gradient_norm"] == pytest.approx(expected["gradient_norm"], rel=1e-3)


@pytest.mark.full
def test_a_recording_without_replies_is_refused_in_one_sentence(ranks, data, start, tmp_path):
    record = tmp_path / "plain.jsonl"
    plain = [argument for argument in arguments(data, tmp_path / "plain", start) if argument not in ENVIRONMENT]
    verified = "evaluation.verifier=tiny_run.starts_with_an_even_token"
    train(ranks, [*plain, verified, f"rollout.record={record}"])
    with pytest.raises(AssertionError, match="no reply of an environment to the response of step 0"):
        replayed = arguments(data, tmp_path / "replayed", start, f"rollout.replay={record}")
        train(ranks, replayed, start=start_and_listen, expected=(0, ""))
