# Copyright (c) 2026 the megatron_selfdistill authors. Apache-2.0.
"""The arithmetic of a step: against figures by hand, part by part, and its printed form."""

from __future__ import annotations

import dataclasses
import functools
import json
import re
import statistics

import pytest
import tiny_run

from megatron_selfdistill.choices import GPU_MEMORY_GB, GPUS
from megatron_selfdistill.config import ConfigError, load
from megatron_selfdistill.instruments.plan.dry_run import Plan, dry_run
from megatron_selfdistill.instruments.plan.engines import MEAN
from megatron_selfdistill.instruments.plan.gpus import MFU, RATES
from megatron_selfdistill.instruments.plan.plan_tables import assumptions, shares
from megatron_selfdistill.instruments.plan.step_time import Lengths, Part, StepTime
from megatron_selfdistill.instruments.report.run_record import PHASES
from megatron_selfdistill.train import main

FEW = ("recipe=qwen3_8b", "data.global_batch_size=64", "rollout.max_new_tokens=2048")
BY_HAND = Lengths(student_prompt=300, teacher_prompt=1000, response=1200, longest=2048)


@functools.cache
def plan_of(*overrides: str) -> Plan:
    return dry_run(load(overrides))


def time_of(*overrides: str, lengths: Lengths | None = None) -> StepTime:
    time = plan_of(*overrides).time
    assert time is not None
    return time if lengths is None else dataclasses.replace(time, lengths=lengths)


def parts_of(time: StepTime) -> dict[str, Part]:
    return {part.name: part for part in time.parts}


def test_a_step_of_qwen3_8b_takes_what_its_arithmetic_by_hand_says():
    """64 problems on 8 H100: figures of another author, who counted no attention in the passes without a gradient.

    Attention is 2 % (student) to 5 % (teacher) of a forward pass, and the student's figure includes its projection.
    """
    time = time_of(*FEW, lengths=BY_HAND)
    parts = parts_of(time)
    assert parts["student"].work + 3 * 64 * 1200 * 2 * 4096 * 151936 == pytest.approx(4.4e15, rel=0.01)
    assert 1.96e15 < parts["teacher"].work < 1.05 * 1.96e15
    assert 1.33e15 < parts["reference"].work < 1.035 * 1.33e15
    assert parts["weights"].work == pytest.approx(2048 * 16.4e9, rel=2e-3)
    assert "2048 reads of 16.4 GB" in parts["weights"].note and "at least 10.0 s at 3.35 TB/s" in parts["weights"].note
    assert 13 < time.turns[0] < 14, "2048 reads of 6.5 to 7 ms"
    assert 1.4 < parts["student"].seconds < 1.9
    assert 0.6 < parts["teacher"].seconds < 0.8 and 0.4 < parts["reference"].seconds < 0.6
    assert 1.6 < time.phases["sync"] < 2.5
    assert parts["gradients over replicas"].seconds + time.phases["optimizer"] < 0.1
    assert time.seconds == pytest.approx(19.5, rel=0.05), "19 to 20 s in all"
    assert time.phases["rollout"] / time.seconds == pytest.approx(0.72, abs=0.02)


def test_every_part_is_its_work_by_its_rate():
    parts = parts_of(time_of(*FEW, lengths=BY_HAND))
    layers = 36 * (4096 * 6144 + 4096**2 + 3 * 4096 * 12288 + 2 * 4096 + 2 * 128) + 4096
    forward = 2 * layers * 1500 + 36 * 2 * 4096 * 1500**2
    assert parts["student"].work == pytest.approx(3 * 64 * forward, rel=2e-4)  # less the padding of the vocabulary
    assert parts["student"].rate == 8 * 989e12 * MFU
    # The student forward and backward, the mix, and the reference once more for its entropy.
    assert parts["output layer"].work == pytest.approx(5 * 64 * 1200 * 2 * 4096 * 152064)
    # A token reads 144 KiB for each token before it: the prompt, and half of the response in the mean.
    read = 8 * 1200 * (300 + 600) * 144 * 1024
    assert (parts["keys and values"].work, parts["keys and values"].rate) == (pytest.approx(read), 2.9e12)
    assert parts["weights"].besides == pytest.approx(2048 * 36 * 25e-6)
    held = parts_of(time_of(*FEW))["state"].work
    assert held == pytest.approx(2 * 12 * 8.190735e9 / 4 / 2, rel=1e-3)
    assert parts["gradients over replicas"].work == pytest.approx(4 * 8.190735e9 / 4 / 2, rel=1e-3)
    assert (parts["gradients over replicas"].rate, parts["weights over replicas"].rate) == (450e9, 450e9)
    assert all(part.seconds == pytest.approx(part.work / part.rate + part.besides) for part in parts.values())


@pytest.mark.parametrize("gpu", GPUS)
def test_the_clock_and_the_memory_are_those_of_the_gpu(gpu):
    plan, rates = plan_of(*FEW, f"cluster.gpu={gpu}"), RATES[gpu]
    parts = parts_of(plan.time)
    assert plan.config.cluster.memory_of_gpu == GPU_MEMORY_GB[gpu]
    assert (parts["weights"].rate, parts["student"].rate) == (rates.copied, 8 * rates.flops * MFU)
    assert parts["weights to engines"].rate == rates.link and 0.8 < rates.copied / rates.bandwidth < 0.9
    assert f"on 8 x {gpu}: {rates.flops / 1e12:.0f} TFLOP/s with an MFU of 35%" in assumptions(plan.time)
    assert load(["cluster.gpu_memory_gb=24", f"cluster.gpu={gpu}"]).cluster.memory_of_gpu == 24


def test_a_gpu_without_a_clock_is_refused():
    with pytest.raises(ConfigError, match=r"cluster\.gpu.*H100, H200, B200"):
        load(["cluster.gpu=A100"])


def test_prompts_have_the_lengths_of_the_data_where_these_are_known(tmp_path):
    tiny_run.write_data(tmp_path)
    keys = tiny_run.overrides(tmp_path, tmp_path / "run", "cluster.num_gpus=2")
    plan = dry_run(load(keys))
    records = [json.loads(line) for line in (tmp_path / "problems.jsonl").read_text().splitlines()]
    problem, solution = (statistics.fmean(len(record[key]) for record in records) for key in ("problem", "solution"))
    # The tokenizer has a token per character, and the template adds H and | to problem and solution.
    assert plan.time.lengths == Lengths(problem, problem + solution + 2, 14 * MEAN, 14)


def test_passes_follow_the_models_of_a_step():
    whole = parts_of(time_of(*FEW))
    alone = parts_of(time_of(*FEW, "target.anchor=student"))
    assert "reference" not in alone and alone["student"].work == whole["student"].work
    per_pass = whole["output layer"].work / 5
    for overrides, passes in {
        ("target.anchor=student",): 4,
        ("target.match=student",): 4,
        ("teacher.weights=ema",): 6,
        ("teacher.weights=current", "target.match=student"): 5,
        ("adapter.rank=8",): 4,
    }.items():
        parts = parts_of(time_of(*FEW, *overrides))
        assert parts["output layer"].work == pytest.approx(passes * per_pass), overrides
    adapted = parts_of(time_of(*FEW, "adapter.rank=8"))
    assert adapted["student"].work == pytest.approx(whole["student"].work * 2 / 3)
    assert adapted["gradients over replicas"].work < whole["gradients over replicas"].work / 100


def test_parts_between_nodes_take_the_network_and_one_sender_serves_all_servers():
    four_nodes = parts_of(time_of("recipe=qwen3_32b"))
    assert {four_nodes[name].rate for name in ("gradients over replicas", "weights over replicas")} == {45e9}
    assert four_nodes["weights to engines"].rate == 450e9, "the ranks of a replica share a node"
    assert four_nodes["weights"].besides > 4096 * 64 * 25e-6, "an engine of several GPUs also reduces"
    served = parts_of(time_of(*FEW, "rollout.placement=server", "rollout.num_servers=8"))
    assert (served["weights to servers"].work, served["weights to servers"].rate) == (
        pytest.approx(16.38e9, rel=1e-3),
        45e9,
    )


def test_a_bubble_is_a_part_of_training():
    keys = ("recipe=qwen3_8b", "parallel.pipeline_model_parallel_size=2", "parallel.tensor_model_parallel_size=2")
    plan = plan_of(*keys)
    parts, bubble = parts_of(plan.time), plan.schedule.bubble
    busy = sum(parts[name].seconds for name in ("student", "teacher", "reference", "output layer"))
    assert bubble > 0 and parts["pipeline bubble"].seconds / (busy + parts["pipeline bubble"].seconds) == (
        pytest.approx(bubble)
    )
    assert "pipeline bubble" not in parts_of(time_of(*FEW))


def test_phases_have_the_names_that_a_run_logs_and_sum_to_the_step():
    time = time_of(*FEW)
    assert list(time.phases) == ["rollout", "sync", "train", "optimizer"] and set(time.phases) <= set(PHASES)
    assert sum(time.phases.values()) == pytest.approx(time.seconds) == pytest.approx(sum(time.turns))
    printed = re.findall(r"(\w+) ([\d.]+)%", shares(time))
    assert [name for name, _ in printed] == list(time.phases)
    assert sum(float(percent) for _, percent in printed) == pytest.approx(100, abs=0.2)


def test_a_run_whose_generation_goes_on_beside_training_is_told_what_its_rollout_phase_is():
    served = (*FEW, "rollout.placement=server", "rollout.num_servers=8")
    waits = "seconds/rollout are only what training waits for"
    assert waits not in shares(time_of(*served))
    assert waits in shares(time_of(*served, "rollout.ahead=1", "rollout.max_staleness=1"))
    assert "sampling in process is left out" in shares(time_of(*FEW, "rollout.engine=megatron"))
    assert plan_of("recipe=chat_logs", "cluster.num_gpus=8", "model=qwen3_8b", "parallel=node_of_8").time is None


def test_a_plan_prints_every_part_and_the_shares(capsys):
    assert main([*FEW, "dry_run=true"]) == 0
    out = capsys.readouterr().out
    rows = re.findall(r"^  (rollout|sync|train|optimizer) +(.+?)  +.*?([\d.]+ m?s)   ", out, re.MULTILINE)
    assert [(phase, name) for phase, name, _ in rows] == [(part.phase, part.name) for part in time_of(*FEW).parts]
    assert "e+15 FLOP" in out and "2900 GB/s" in out and "= a step" in out and "\nshares of a step: rollout" in out
