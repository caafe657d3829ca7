# Copyright (c) 2026 the megatron_selfdistill authors. Apache-2.0.
"""Whole runs of a tiny model on fake servers, a third of whose responses is slow."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from fake_vllm import FakeVllm
from tiny_run import overrides, reproducible_metrics

RESPONSES = ("length_mean", "truncated_share", "loop_share", "quoted_hint_share")
"""The metrics of the responses that two runs of the same steps have alike."""


def is_slow(prompt: list[int]) -> bool:
    """Return whether the servers are slow with the response to a prompt."""
    return sum(prompt) % 3 == 0


def be_slow(servers: list[FakeVllm], seconds: float) -> None:
    """Let a third of the responses take ``seconds`` longer than the others, and let all end with a stop token."""
    for server in servers:
        server.seconds_of = lambda prompt: seconds if is_slow(prompt) else 0.0
        server.vocab_size, server.ends = 10, True


def on(servers: list[FakeVllm], data: Path, run_dir: Path, *more: str) -> list[str]:
    """Return the overrides of a run of three steps on ``servers``, with microbatches of one or two contexts.

    The servers know no model, so that their log-probs are not those of the trainer, which a guard would stop.
    """
    return overrides(
        data,
        run_dir,
        "num_steps=3",
        "checkpoint.save_every=1",
        "rollout.engine=vllm",
        "rollout.placement=server",
        f"rollout.servers=[{','.join(server.address for server in servers)}]",
        "rollout.transfer=gloo",
        "rollout.num_samples=2",
        "schedule.max_tokens=64",
        "guards.max_log_prob_distance=null",
        *more,
    )


def metrics_of(run_dir: Path) -> list[dict[str, Any]]:
    """Return all metrics of each step, without those of evaluations."""
    lines = [json.loads(line) for line in (run_dir / "metrics.jsonl").read_text().splitlines()]
    return [line for line in lines if "loss/mean" in line]


def assert_same_steps(one: Path, other: Path) -> None:
    """Assert that two runs have the same losses, norms and weights, up to the order of sums."""
    runs = [[line for line in reproducible_metrics(run) if "loss/mean" in line] for run in (one, other)]
    pairs = list(zip(*runs, strict=True))
    assert len(pairs) == 3
    for first, second in pairs:
        for key in ("loss/mean", "gradient_norm", "entropy/student", "entropy/target"):
            assert first[key] == pytest.approx(second[key], rel=1e-4), key
        for key in ("tokens/response", "tokens/rollout", *(f"response/{name}" for name in RESPONSES)):
            assert first[key] == second[key], key
