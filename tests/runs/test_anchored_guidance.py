# Copyright (c) 2026 the megatron_selfdistill authors. Apache-2.0.
"""Whole runs whose guided responses are sampled from a target with a frozen reference."""

from __future__ import annotations

import pytest
from tiny_run import assert_guided_by_the_teacher_of_the_loss, overrides, train

OPTIONS = ["target.anchor=reference", "rollout.guidance=mixed", "metrics.show_samples=0"]


@pytest.mark.parametrize(
    "teacher", ["ema", *(pytest.param(other, marks=pytest.mark.full) for other in ("frozen", "current"))]
)
def test_the_sampler_has_the_teacher_and_the_student_of_the_loss(ranks, data, tmp_path, teacher):
    recorded = tmp_path / "recorded.jsonl"
    options = [f"teacher.weights={teacher}", "teacher.ema_decay=0.5", "teacher.offload=cpu", "target.match=student"]
    options += ["num_steps=3", "optimizer.lr=1e-2", "optimizer.lr_warmup_steps=0", "metrics.teacher_every=1"]
    train(ranks, overrides(data, tmp_path / "run", *OPTIONS, *options, f"rollout.record={recorded}"))
    assert_guided_by_the_teacher_of_the_loss(tmp_path / "run", recorded)
