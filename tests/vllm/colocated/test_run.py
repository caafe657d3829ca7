# Copyright (c) 2026 the megatron_selfdistill authors. Apache-2.0.
"""Whole training runs whose rollouts come from vLLM in the trainer's processes."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from tiny_run import overrides, reproducible_metrics, train

from megatron_selfdistill.instruments.evaluate import evaluate_command as evaluate

TIMEOUT = 600.0  # the first call on a rank imports vLLM
VLLM = [
    "rollout.engine=vllm",
    "rollout.kv_cache_gb=0.05",
    "model.hidden_size=64",  # heads of 32, the least that vLLM's kernels have
    "model.num_attention_heads=2",
    "model.num_layers=2",
    "num_steps=3",
]
VERIFIED = "evaluation.verifier=tiny_run.starts_with_an_even_token"


@pytest.mark.parametrize(
    ("world_size", "options"),
    [
        (1, []),
        (2, ["parallel.tensor_model_parallel_size=2", "target.anchor=student", "rollout.engine_tp=2"]),
        (2, ["loss.rollout_correction=truncated", "rollout.num_samples=2"]),
    ],
    ids=["one rank", "TP2, one engine", "DP2, corrected, two engines"],
)
def test_every_step_trains_on_responses_of_its_own_weights(ranks, data, tmp_path, world_size, options):
    recorded = tmp_path / "recorded.jsonl"
    arguments = overrides(data, tmp_path / "run", *VLLM, *options, f"tests.record={recorded}")
    train(ranks, arguments, world_size, timeout=TIMEOUT)
    lines = reproducible_metrics(tmp_path / "run")
    assert [line["step"] for line in lines] == [1, 2, 3]
    for line in lines:
        assert line["sampler/log_prob_max_abs_diff"] < 1e-4, "vLLM and the trainer disagree about the same weights"
        assert line["rollout/sync_bytes"] > 0 and line["loss/mean"] > 0
        if "loss.rollout_correction=truncated" in options:
            assert line["correction/weight_mean"] == pytest.approx(1, abs=1e-3)
    written = [json.loads(line) for line in recorded.read_text().splitlines()]
    assert all(record["weight_version"] == record["step"] for record in written)
    assert {record["step"] for record in written} == {0, 1, 2}


def test_a_run_with_adapters_sends_the_factors_alone(ranks, data, tmp_path):
    recorded = tmp_path / "recorded.jsonl"
    adapters = ["adapter.rank=4", "optimizer.lr=0.1", "optimizer.lr_warmup_steps=0"]
    arguments = overrides(data, tmp_path / "run", *VLLM, *adapters, f"tests.record={recorded}")
    train(ranks, arguments, timeout=TIMEOUT)
    lines = reproducible_metrics(tmp_path / "run")
    sent = [line["rollout/sync_bytes"] for line in lines]
    assert sent[0] > 3 * sent[1] and sent[1] == sent[2] > 0
    written = [json.loads(line) for line in recorded.read_text().splitlines()]
    assert all(record["weight_version"] == record["step"] for record in written)
    for line in lines:
        assert line["sampler/log_prob_max_abs_diff"] < 1e-4
        assert line["gradient_norm"] > 0
    found, expected = (evaluated(ranks, data, tmp_path, engine) for engine in ("vllm", "megatron"))
    assert found == pytest.approx(expected, rel=1e-4) and len(set(expected)) > 1


def evaluated(ranks, data: Path, directory: Path, engine: str) -> list[float]:
    model = ["--megatron", str(directory / "run" / "checkpoints"), "--data", str(data / "problems.jsonl")]
    out = ["--out", str(directory / engine), "--num-samples", "1", f"data.tokenizer={data}/tokenizer", "data.limit=8"]
    settings = ["optimizer=fp32", "rollout.max_new_tokens=8", "rollout.kv_cache_gb=0.05", f"rollout.engine={engine}"]
    arguments = [*model, *out, *settings]
    assert ranks.run(evaluate.main, arguments, world_size=1, init_process_group=False, timeout=TIMEOUT) == [0]
    lines = (directory / engine / "problems.jsonl").read_text().splitlines()
    return [json.loads(line)["greedy"]["confidence"] for line in lines]


def test_a_recipe_with_rewards_trains_on_the_samples_of_its_own_weights(ranks, data, tmp_path):
    """With equal weights p / mu is 1 at every token, so that nothing is clipped and the gradient is that of rewards."""
    options = ["rollout.num_samples=8", "optimizer.lr_warmup_steps=0", VERIFIED]
    train(ranks, ["recipe=grpo", *overrides(data, tmp_path / "run", *VLLM, *options)], timeout=TIMEOUT)
    lines = reproducible_metrics(tmp_path / "run")
    assert [line["step"] for line in lines] == [1, 2, 3]
    for line in lines:
        assert 0 < line["rewards/mean"] < 1 and line["rewards/mixed_groups"] > 0
        assert line["sampler/log_prob_max_abs_diff"] < 1e-4, "log p - log mu of every token"
        assert line["terms/clipped_share"] == 0 and line["terms/policy_abs_mean"] > 0 and line["gradient_norm"] > 0
