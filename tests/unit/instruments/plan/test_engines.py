# Copyright (c) 2026 the megatron_selfdistill authors. Apache-2.0.
"""What the engines of a plan hold and get."""

from __future__ import annotations

import pytest

from megatron_selfdistill.config import load
from megatron_selfdistill.instruments.plan.dry_run import dry_run
from megatron_selfdistill.instruments.plan.engines import backward_passes
from megatron_selfdistill.instruments.plan.gpus import RATES
from megatron_selfdistill.instruments.plan.plan_tables import summary


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
    bubbles = [dry_run(load([*adapters[: 2 + few], *stages])).bubble for few in (0, 1)]
    # 256 microbatches of all models with a backward pass of 2 and of 1; three stages wait for one of the student's.
    assert bubbles == pytest.approx([9 / (256 * 5 + 9), 6 / (256 * 4 + 6)])


def test_the_plan_states_what_is_trained_and_what_an_update_sends():
    lines = summary(dry_run(load(["recipe=qwen3_8b"])))
    assert "an update of the engines' weights sends all weights, 16.38 GB" in lines
    lines = summary(dry_run(load(["recipe=qwen3_8b", "rollout.engine=megatron", "adapter.rank=8"])))
    parameters = 8 * 36 * sum((4096 + 6144, 4096 + 4096, 4096 + 2 * 12288, 12288 + 4096))
    assert f"trained: {parameters / 1e6:.1f} M parameters of adapters of rank 8, 0.22% of the model" in lines
    assert not any("an update" in line for line in lines)
    lines = summary(dry_run(load(["recipe=qwen3_8b", "adapter.rank=8"])))
    modules = parameters + 8 * 36 * 3 * 4096  # A of q, k and v, and of gate and up, in a copy of each module's own
    assert f"an update of the engines' weights sends the adapters, {2 * modules / 1e6:.2g} MB" in lines
