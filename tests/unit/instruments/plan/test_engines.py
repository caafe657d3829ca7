# Copyright (c) 2026 the megatron_selfdistill authors. Apache-2.0.
"""The load of the engines of a plan: the arithmetic, the warning, and the effect of its advice."""

from __future__ import annotations

import functools
import re

import pytest

from megatron_selfdistill.config import load
from megatron_selfdistill.instruments.plan.dry_run import dry_run
from megatron_selfdistill.instruments.plan.engines import Engines, backward_passes
from megatron_selfdistill.instruments.plan.gpus import RATES
from megatron_selfdistill.instruments.plan.plan_tables import seconds, summary
from megatron_selfdistill.instruments.plan.step_time import StepTime
from megatron_selfdistill.train import main


@functools.cache
def time_of(*overrides: str) -> StepTime:
    found = dry_run(load(overrides)).time
    assert found is not None
    return found


def engines_of(*overrides: str) -> Engines:
    found = time_of(*overrides).engines
    assert found is not None
    return found


def test_a_rollout_takes_the_reads_of_all_weights_for_each_token_whatever_the_batch():
    keys = ("recipe=qwen3_8b", "data.global_batch_size=64")
    few, many = engines_of(*keys), engines_of("recipe=qwen3_8b")
    assert (few.count, few.sequences, many.sequences) == (8, 8, 64)
    # 8.19e9 parameters of 2 bytes at 2.9e12 bytes per second, and 36 layers, 4096 times.
    (read, cache), (read_many, cache_many) = (
        [part.seconds for part in time_of(*overrides).parts if part.phase == "rollout"]
        for overrides in (keys, keys[:1])
    )
    assert read == pytest.approx((8.190735e9 * 2 / 2.9e12 + 36 * 25e-6) * 4096, rel=1e-3)
    assert read_many == pytest.approx(read * 64 / many.capacity), "the cache holds 56 of the 64 at a time"
    assert cache_many == pytest.approx(8 * cache), "every sequence reads its own keys and values"
    assert few.balance == many.balance == pytest.approx(RATES["H100"].balance)


def test_frozen_weights_take_no_pass_for_their_gradients():
    adapters = ("recipe=qwen3_8b", "rollout.engine=megatron", "adapter.rank=8")
    recompute = ("schedule.recompute.granularity=full", "schedule.recompute.method=uniform")
    recompute += ("schedule.recompute.num_layers=1",)
    found = [backward_passes(load(keys)) for keys in (("recipe=qwen3_8b",), adapters, adapters + recompute)]
    assert found == [2, 1, 2]
    stages = ("parallel.pipeline_model_parallel_size=4", "parallel.tensor_model_parallel_size=2")
    bubbles = [dry_run(load([*adapters[: 2 + few], *stages])).schedule.bubble for few in (0, 1)]
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


@pytest.mark.parametrize(
    "overrides",
    [
        ("recipe=qwen3_8b", "data.global_batch_size=64"),
        ("recipe=qwen3_8b", "data.global_batch_size=16"),
        ("recipe=qwen3_32b", "data.global_batch_size=128"),
        ("recipe=qwen3_8b", "data.global_batch_size=64", "rollout.kv_cache_gb=4"),
    ],
)
def test_too_few_sequences_are_a_warning_and_its_advice_ends_it(overrides):
    warning = time_of(*overrides).warning
    assert warning is not None
    batch = re.search(r"raise data\.global_batch_size to (\d+), or rollout\.num_samples", warning)
    assert batch is not None
    kept = [override for override in overrides if "global_batch_size" not in override]
    assert time_of(*kept, f"data.global_batch_size={batch[1]}").warning is None


def test_samples_fill_an_engine_too():
    few = ("recipe=qwen3_8b", "data.global_batch_size=64")
    assert engines_of(*few, "rollout.num_samples=4").sequences == 32


def test_the_plan_prints_how_full_the_engines_are_and_the_warning(capsys):
    few = ("recipe=qwen3_8b", "data.global_batch_size=64")
    assert main([*few, "dry_run=true"]) == 0
    out, (rollout, rest) = capsys.readouterr().out, time_of(*few).turns
    assert "\n8 sequences per engine and step; its KV cache holds about 56 at a time" in out
    assert (
        f"by arithmetic for H100 GPUs (below) {seconds(rollout, 0)} of rollout and {seconds(rest, 0)} of the rest"
        in out
    )
    assert "of a step\nwarning: 8 sequences per engine" in out


@pytest.mark.parametrize("override", ["rollout.engine=megatron", "recipe=chat_logs"])
def test_without_vllm_there_is_nothing_to_fill(override):
    plan = dry_run(load(["cluster.num_gpus=8", "model=qwen3_8b", "parallel=node_of_8", override]))
    assert plan.engines is None and not any("sequences per engine" in line for line in summary(plan))


SERVERS = ("recipe=qwen3_8b", "rollout.placement=server", "rollout.num_servers=8", "data.global_batch_size=64")


def ahead_line(*overrides: str) -> str | None:
    """Return the line of a plan about the step whose servers work ahead."""
    lines = summary(dry_run(load([*SERVERS, *overrides])))
    found = [line for line in lines if line.startswith("by the same arithmetic a step takes")]
    return found[0] if found else None


@pytest.mark.parametrize("overrides", [(), ("method.name=uni_opd", "rollout.num_samples=2")], ids=["plain", "selected"])
def test_a_plan_with_servers_names_the_times_in_turns_and_ahead(overrides):
    generation, training = dry_run(load([*SERVERS, *overrides])).time.turns
    assert ahead_line(*overrides) == (
        f"by the same arithmetic a step takes {generation + training:.0f} s in turns, {generation:.0f} s with "
        "rollout.ahead=1: rollout.ahead=1 gains the shorter of both, if responses of weights that are one step old "
        "will do"
    )


def test_a_plan_is_silent_where_generation_and_training_must_take_turns():
    assert ahead_line("method.name=own_solutions") is None
