# Copyright (c) 2026 the megatron_selfdistill authors. Apache-2.0.
"""The arithmetic of a step, against figures by hand."""

from __future__ import annotations

import functools

import pytest

from megatron_selfdistill.choices import GPU_MEMORY_GB, GPUS
from megatron_selfdistill.config import load
from megatron_selfdistill.instruments.plan.dry_run import Plan, dry_run
from megatron_selfdistill.instruments.plan.engines import MEAN
from megatron_selfdistill.instruments.plan.gpus import MFU, RATES
from megatron_selfdistill.instruments.plan.step_time import StepPart

FEW = ("recipe=qwen3_8b", "data.global_batch_size=64", "rollout.max_new_tokens=2048")


@functools.cache
def plan_of(*overrides: str) -> Plan:
    return dry_run(load(overrides))


def parts_of(*overrides: str) -> dict[str, StepPart]:
    return {part.name: part for part in plan_of(*overrides).parts}


def test_every_part_is_its_work_by_its_rate():
    parts, response, prompt = parts_of(*FEW), 2048 * MEAN, (8192 - 2048) * MEAN
    layers = 36 * (4096 * 6144 + 4096**2 + 3 * 4096 * 12288 + 2 * 4096 + 2 * 128) + 4096
    length = prompt + response
    forward = 2 * layers * length + 36 * 2 * 4096 * length**2
    assert parts["student"].work == pytest.approx(3 * 64 * forward, rel=2e-4)  # less the padding of the vocabulary
    assert parts["teacher"].work == parts["reference"].work == pytest.approx(parts["student"].work / 3)
    assert parts["student"].rate == 8 * 989e12 * MFU
    # The student forward and backward, the mix, and the reference once more for its entropy.
    assert parts["output layer"].work == pytest.approx(5 * 64 * response * 2 * 4096 * 152064)
    # A token reads 144 KiB for each token before it: the prompt, and half of the response in the mean.
    read = 8 * response * (prompt + response / 2) * 144 * 1024
    assert (parts["keys and values"].work, parts["keys and values"].rate) == (pytest.approx(read), 2.9e12)
    assert parts["weights"].work == pytest.approx(2048 * 16.4e9, rel=2e-3)
    assert parts["weights"].besides == pytest.approx(2048 * 36 * 25e-6)
    assert parts["state"].work == pytest.approx(2 * 12 * 8.190735e9 / 4 / 2, rel=1e-3)
    assert parts["gradients over replicas"].work == pytest.approx(4 * 8.190735e9 / 4 / 2, rel=1e-3)
    assert (parts["gradients over replicas"].rate, parts["weights over replicas"].rate) == (450e9, 450e9)
    assert all(part.seconds == pytest.approx(part.work / part.rate + part.besides) for part in parts.values())


@pytest.mark.parametrize("gpu", GPUS)
def test_the_clock_and_the_memory_are_those_of_the_gpu(gpu):
    plan, rates = plan_of(*FEW, f"cluster.gpu={gpu}"), RATES[gpu]
    parts = {part.name: part for part in plan.parts}
    assert plan.config.cluster.memory_of_gpu == GPU_MEMORY_GB[gpu]
    assert (parts["weights"].rate, parts["student"].rate) == (rates.copied, 8 * rates.flops * MFU)
    assert parts["weights to engines"].rate == rates.link and 0.8 < rates.copied / rates.bandwidth < 0.9
    assert load(["cluster.gpu_memory_gb=24", f"cluster.gpu={gpu}"]).cluster.memory_of_gpu == 24


def test_passes_follow_the_models_of_a_step():
    whole = parts_of(*FEW)
    alone = parts_of(*FEW, "target.anchor=student")
    assert "reference" not in alone and alone["student"].work == whole["student"].work
    per_pass = whole["output layer"].work / 5
    for overrides, passes in {
        ("target.anchor=student",): 4,
        ("target.match=student",): 4,
        ("teacher.weights=ema",): 6,
        ("teacher.weights=current", "target.match=student"): 5,
        ("adapter.rank=8",): 4,
    }.items():
        assert parts_of(*FEW, *overrides)["output layer"].work == pytest.approx(passes * per_pass), overrides
    adapted = parts_of(*FEW, "adapter.rank=8")
    assert adapted["student"].work == pytest.approx(whole["student"].work * 2 / 3)
    assert adapted["gradients over replicas"].work < whole["gradients over replicas"].work / 100


def test_parts_between_nodes_take_the_network_and_one_sender_serves_all_servers():
    four_nodes = parts_of("recipe=qwen3_32b")
    assert {four_nodes[name].rate for name in ("gradients over replicas", "weights over replicas")} == {45e9}
    assert four_nodes["weights to engines"].rate == 450e9, "the ranks of a replica share a node"
    assert four_nodes["weights"].besides > 4096 * 64 * 25e-6, "an engine of several GPUs also reduces"
    served = parts_of(*FEW, "rollout.placement=server", "rollout.num_servers=8")["weights to servers"]
    assert (served.work, served.rate) == (pytest.approx(16.38e9, rel=1e-3), 45e9)


def test_a_bubble_is_a_part_of_training():
    keys = ("recipe=qwen3_8b", "parallel.pipeline_model_parallel_size=2", "parallel.tensor_model_parallel_size=2")
    parts, bubble = parts_of(*keys), plan_of(*keys).step.bubble
    busy = sum(parts[name].seconds for name in ("student", "teacher", "reference", "output layer"))
    waited = parts["pipeline bubble"].seconds
    assert bubble > 0 and waited / (busy + waited) == pytest.approx(bubble)
    assert "pipeline bubble" not in parts_of(*FEW)


def test_without_engines_or_lengths_the_arithmetic_has_fewer_parts():
    assert "weights" not in parts_of(*FEW, "rollout.engine=megatron")
    assert not plan_of("recipe=chat_logs", "cluster.num_gpus=8", "model=qwen3_8b", "parallel=node_of_8").parts
