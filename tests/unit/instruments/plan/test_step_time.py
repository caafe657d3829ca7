# Copyright (c) 2026 the megatron_selfdistill authors. Apache-2.0.
"""The arithmetic of a step, against figures by hand."""

from __future__ import annotations

import functools

import pytest

from megatron_selfdistill.config import load
from megatron_selfdistill.instruments.plan.dry_run import Plan, dry_run
from megatron_selfdistill.instruments.plan.step_time import MEAN, MFU, StepPart, backward_passes

FEW = ("recipe=qwen3_8b", "data.global_batch_size=64", "rollout.max_new_tokens=2048")


@functools.cache
def plan_of(*overrides: str) -> Plan:
    return dry_run(load(overrides))


def parts_of(*overrides: str) -> dict[str, StepPart]:
    return {part.name: part for part in plan_of(*overrides).parts}


def test_every_part_is_its_work_by_its_rate():
    parts, response, prompt = parts_of(*FEW), 2048 * MEAN, (8192 - 2048) * MEAN
    length = prompt + response
    forward = 2 * 8_190_735_360 * length + 36 * 2 * 4096 * length**2
    assert parts["student"].work == pytest.approx(3 * 64 * forward)
    assert parts["teacher"].work == parts["reference"].work == pytest.approx(parts["student"].work / 3)
    assert parts["student"].rate == 8 * 989e12 * MFU
    # A token reads 144 KiB for each token before it: the prompt, and half of the response in the mean.
    read = 8 * response * (prompt + response / 2) * 144 * 1024
    assert (parts["keys and values"].work, parts["keys and values"].rate) == (pytest.approx(read), 2.9e12)
    assert parts["weights"].work == pytest.approx(2048 * 16.4e9, rel=2e-3)
    # All 8 sequences are in the cache; of the recipe's 64, half-written ones of (4096 + 2048) / 3 tokens, 56 are.
    assert parts_of("recipe=qwen3_8b")["weights"].work == pytest.approx(64 / 56 * 4096 * 16.38e9, rel=1e-3)
    assert all(part.seconds == part.work / part.rate for part in parts.values())


@pytest.mark.full
def test_a_token_of_a_mixture_of_experts_uses_some_of_the_parameters():
    parts, plan = parts_of("recipe=gpt_oss_120b"), plan_of("recipe=gpt_oss_120b")
    length = MEAN * (plan.config.data.max_length or 0)
    per_token = parts["teacher"].work / plan.config.data.global_batch_size / length / 2
    active = 5.13e9 + 0.58e9  # as published, and the embedding, which its authors leave out
    assert per_token - 36 * 64 * 64 * length == pytest.approx(active, rel=0.02)


def test_passes_follow_the_models_and_the_controls_of_a_step_and_its_engines():
    whole, alone = parts_of(*FEW), parts_of(*FEW, "target.anchor=student")
    assert "reference" not in alone and alone["student"].work == whole["student"].work
    assert parts_of(*FEW, "adapter.rank=8")["student"].work == pytest.approx(whole["student"].work * 2 / 3)
    parts = parts_of(*FEW, "target.control=other", "target.num_controls=3")
    assert parts["controls"].work == 3 * parts["teacher"].work and "controls" not in whole
    assert "weights" not in parts_of(*FEW, "rollout.engine=megatron")
    assert not plan_of("recipe=chat_logs", "cluster.num_gpus=8", "model=qwen3_8b", "parallel=node_of_8").parts
    # One sender serves all servers over the network.
    served = parts_of(*FEW, "rollout.placement=server", "rollout.num_servers=8")["weights to servers"]
    assert (served.work, served.rate) == (pytest.approx(16.38e9, rel=1e-3), 45e9)


def test_a_horizon_shortens_what_is_sampled_and_read():
    whole, cut, grown = (parts_of(*FEW, *more) for more in ([], ["rollout.horizon=100"], ["rollout.horizon=[9,100,5]"]))
    prompt, response = (8192 - 2048) * MEAN, 2048 * MEAN
    assert cut["weights"].work == pytest.approx(whole["weights"].work * 100 / 2048)
    assert cut["keys and values"].work == pytest.approx(8 * 100 * (prompt + 50) * 144 * 1024)
    assert cut["student"].work < whole["student"].work * (prompt + 100) / (prompt + response)
    assert [part.work for part in grown.values()] == [part.work for part in cut.values()]
    assert parts_of(*FEW, "rollout.horizon=2048") == whole


def test_training_loses_the_bubble_of_a_pipeline():
    keys = ("recipe=qwen3_8b", "parallel.pipeline_model_parallel_size=2", "parallel.tensor_model_parallel_size=2")
    part, bubble = parts_of(*keys)["student"], plan_of(*keys).step.bubble
    assert bubble > 0 and part.rate == pytest.approx(8 * 989e12 * MFU * (1 - bubble))


def test_frozen_weights_take_no_pass_for_their_gradients():
    adapters = ("recipe=qwen3_8b", "rollout.engine=megatron", "adapter.rank=8")
    recompute = tuple(f"schedule.recompute.{key}" for key in ("granularity=full", "method=uniform", "num_layers=1"))
    found = [backward_passes(load(keys)) for keys in (("recipe=qwen3_8b",), adapters, adapters + recompute)]
    assert found == [2, 1, 2]
    stages = ("parallel.pipeline_model_parallel_size=4", "parallel.tensor_model_parallel_size=2")
    bubbles = [dry_run(load([*adapters[: 2 + few], *stages])).step.bubble for few in (0, 1)]
    # 256 microbatches of all models with a backward pass of 2 and of 1; three stages wait for one of the student's.
    assert bubbles == pytest.approx([9 / (256 * 5 + 9), 6 / (256 * 4 + 6)])
