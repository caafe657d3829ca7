# Copyright (c) 2026 the megatron_selfdistill authors. Apache-2.0.
"""What the engines of a plan hold and get."""

from __future__ import annotations

import pytest

from megatron_selfdistill.config import load
from megatron_selfdistill.instruments.plan.dry_run import dry_run
from megatron_selfdistill.instruments.plan.engines import backward_passes
from megatron_selfdistill.instruments.plan.gpus import RATES


def test_the_samples_of_a_step_are_divided_among_the_engines():
    few = ("recipe=qwen3_8b", "data.global_batch_size=64")
    for overrides, sequences in ((few, 8), (("recipe=qwen3_8b",), 64), ((*few, "rollout.num_samples=4"), 32)):
        engines = dry_run(load(overrides)).engines
        assert engines is not None and engines.sequences == sequences
        assert engines.balance == pytest.approx(RATES["H100"].balance) and engines.full == engines.capacity == 56


def test_frozen_weights_take_no_pass_for_their_gradients():
    adapters = ("recipe=qwen3_8b", "rollout.engine=megatron", "adapter.rank=8")
    recompute = ("schedule.recompute.granularity=full", "schedule.recompute.method=uniform")
    recompute += ("schedule.recompute.num_layers=1",)
    found = [backward_passes(load(keys)) for keys in (("recipe=qwen3_8b",), adapters, adapters + recompute)]
    assert found == [2, 1, 2]
    stages = ("parallel.pipeline_model_parallel_size=4", "parallel.tensor_model_parallel_size=2")
    bubbles = [dry_run(load([*adapters[: 2 + few], *stages])).step.bubble for few in (0, 1)]
    # 256 microbatches of all models with a backward pass of 2 and of 1; three stages wait for one of the student's.
    assert bubbles == pytest.approx([9 / (256 * 5 + 9), 6 / (256 * 4 + 6)])
