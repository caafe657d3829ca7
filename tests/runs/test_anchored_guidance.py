# Copyright (c) 2026 the megatron_selfdistill authors. Apache-2.0.
"""Whole runs whose guided responses are sampled from a target with a frozen reference."""

from __future__ import annotations

import json

import pytest
from tiny_run import mean_log_probs, overrides, reproducible_metrics, train

from megatron_selfdistill.config import load
from megatron_selfdistill.errors import ConfigError

OPTIONS = ["target.anchor=reference", "rollout.guidance=mixed", "metrics.show_samples=0"]


@pytest.mark.parametrize(
    "teacher", ["ema", *(pytest.param(other, marks=pytest.mark.full) for other in ("frozen", "current"))]
)
def test_the_sampler_has_the_teacher_and_the_student_of_the_loss(ranks, data, tmp_path, teacher):
    """The mean log-probs that the responses carry are those that the loss computes in every step."""
    recorded = tmp_path / "recorded.jsonl"
    options = [f"teacher.weights={teacher}", "teacher.ema_decay=0.5", "teacher.offload=cpu", "target.match=student"]
    options += ["num_steps=3", "optimizer.lr=1e-2", "optimizer.lr_warmup_steps=0", "metrics.teacher_every=1"]
    train(ranks, overrides(data, tmp_path / "run", *OPTIONS, *options, f"rollout.record={recorded}"))
    records = [json.loads(line) for line in recorded.read_text().splitlines()]
    for step, line in enumerate(reproducible_metrics(tmp_path / "run")):
        assert line["guided/share"] == 1
        means = mean_log_probs(records, step)
        assert line["teacher_cross_entropy"] == pytest.approx(-means["teacher_log_probs"], abs=1e-4)
        assert line["sampler/log_prob_max_abs_diff"] < 1e-3
        assert step == 0 or abs(means["log_probs"] - means["teacher_log_probs"]) > 1e-3


@pytest.mark.parametrize("keys", [["rollout.engine=vllm"], ["rollout.engine=vllm", "adapter.rank=4"]])
def test_samplers_without_the_weights_of_the_reference_are_refused(data, tmp_path, keys):
    with pytest.raises(ConfigError, match=r"in process: it needs rollout\.engine=megatron, .* got vllm"):
        load(overrides(data, tmp_path / "run", *OPTIONS, *keys))
