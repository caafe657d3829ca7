# Copyright (c) 2026 the megatron_selfdistill authors. Apache-2.0.
"""Whole runs of a model with gated delta nets: they train, and resume bit for bit."""

from __future__ import annotations

from pathlib import Path

import pytest
from tiny_run import assert_resumes_equal, overrides, reproducible_metrics, train

GATED_DELTA = (
    "model.qk_layernorm=true",
    "model.rotary_percent=0.5",
    "+model.transformer={experimental_attention_variant: gated_delta_net, linear_attention_freq: [1, 0], "
    "linear_num_key_heads: 2, linear_num_value_heads: 4, linear_key_head_dim: 8, linear_value_head_dim: 8, "
    "attention_output_gate: true, layernorm_zero_centered_gamma: true}",
)


def arguments(data: Path, run: Path, *more: str) -> list[str]:
    return overrides(data, run, *GATED_DELTA, "checkpoint.save_every=1", "num_steps=2", *more)


@pytest.fixture(scope="module")
def whole(ranks, data, tmp_path_factory) -> Path:
    run = tmp_path_factory.mktemp("gated") / "run"
    train(ranks, arguments(data, run, f"rollout.record={run}/responses.jsonl"))
    return run


def test_a_run_trains(whole):
    metrics = reproducible_metrics(whole)
    assert len(metrics) == 2 and all(step["loss/mean"] > 0 for step in metrics)


@pytest.mark.full
def test_a_run_resumes_bit_for_bit(ranks, data, whole):
    assert_resumes_equal(ranks, whole, lambda run: arguments(data, run), step=1, num_steps=2)
