# Copyright (c) 2026 the megatron_selfdistill authors. Apache-2.0.
"""The load of the engines of a plan: the arithmetic, the warning, and the effect of its advice."""

from __future__ import annotations

import functools
import re

import pytest

from megatron_selfdistill.config import load
from megatron_selfdistill.plan.dry_run import dry_run
from megatron_selfdistill.plan.engines import Engines, backward_passes
from megatron_selfdistill.plan.plan_tables import summary
from megatron_selfdistill.train import main


@functools.cache
def engines_of(*overrides: str) -> Engines:
    found = dry_run(load(overrides)).engines
    assert found is not None
    return found


def test_a_rollout_takes_the_reads_of_all_weights_for_each_token_whatever_the_batch():
    few, many = engines_of("recipe=qwen3_8b", "data.global_batch_size=64"), engines_of("recipe=qwen3_8b")
    assert (few.count, few.sequences, many.sequences) == (8, 8, 64)
    # 8.19e9 parameters of 2 bytes at 4.3e12 bytes per second, 4096 times; the cache holds 56 of the 64 at a time.
    assert few.seconds[0] == pytest.approx(8.190735e9 * 2 / 4.3e12 * 4096, rel=1e-3)
    assert many.seconds[0] == pytest.approx(few.seconds[0] * 64 / many.capacity)
    # 10 FLOPs (forward, backward, the forwards of teacher and reference), a third of 4096 tokens, 8 GPUs at 40 %.
    training = 10 * 8.190735e9 * 64 * 4096 / 3 / (8 * 780e12 * 0.4)
    assert few.seconds[1] == pytest.approx(training, rel=1e-3)
    assert many.seconds[1] == pytest.approx(8 * training, rel=1e-3)


def test_a_reference_takes_a_forward_pass_and_its_projections():
    recipe = ("recipe=qwen3_8b", "data.global_batch_size=64")
    projection, parameters = 2 * 4096 * 151936, 8.190735e9
    plain = engines_of(*recipe, "target.anchor=student").seconds[1] / 8
    for overrides, extra in {
        (): 0,  # the mix is projected once, and the reference once for its entropy
        ("target.match=student",): -1,
        ("teacher.weights=ema",): 1,
        ("teacher.weights=current", "target.match=student"): 0,
    }.items():
        found = engines_of(*recipe, *overrides).seconds[1]
        assert found / plain == pytest.approx(10 + extra * projection / parameters, rel=1e-3), overrides


def test_frozen_weights_take_no_pass_for_their_gradients():
    adapters = ("recipe=qwen3_8b", "rollout.engine=megatron", "adapter.rank=8")
    recompute = ("schedule.recompute_granularity=full", "schedule.recompute_method=uniform")
    recompute += ("schedule.recompute_num_layers=1",)
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
    assert f"an update of the engines' weights sends the adapters, {2 * modules / 1e9:.2f} GB" in lines


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
    warning = engines_of(*overrides).warning
    assert warning is not None
    batch = re.search(r"raise data\.global_batch_size to (\d+), or rollout\.num_samples", warning)
    assert batch is not None
    kept = [override for override in overrides if "global_batch_size" not in override]
    assert engines_of(*kept, f"data.global_batch_size={batch[1]}").warning is None


def test_samples_and_halves_of_guided_pairs_fill_an_engine_too():
    few = ("recipe=qwen3_8b", "data.global_batch_size=64")
    assert engines_of(*few, "rollout.num_samples=4").sequences == 32
    assert engines_of(*few, "rollout.guidance=mixed", "target.anchor=student").sequences == 16


def test_the_plan_prints_how_full_the_engines_are_and_the_warning(capsys):
    assert main(["recipe=qwen3_8b", "data.global_batch_size=64", "dry_run=true"]) == 0
    out = capsys.readouterr().out
    assert "\n8 sequences per engine and step; its KV cache holds about 56 at a time" in out
    assert "16 s of rollout and 3 s of training per step\nwarning: 8 sequences per engine" in out
    assert "raise data.global_batch_size to 512" in out


@pytest.mark.parametrize("override", ["rollout.engine=megatron", "recipe=chat_logs"])
def test_without_vllm_there_is_nothing_to_fill(override):
    plan = dry_run(load(["cluster.num_gpus=8", "model=qwen3_8b", "parallel=node_of_8", override]))
    assert plan.engines is None and not any("sequences per engine" in line for line in summary(plan))


SERVERS = ("recipe=qwen3_8b", "rollout.placement=server", "rollout.num_servers=8", "data.global_batch_size=64")


def overlap_line(*overrides: str) -> str | None:
    """Return the line of a plan about the ways in which generation and training can share a step."""
    lines = summary(dry_run(load([*SERVERS, *overrides])))
    found = [line for line in lines if line.startswith("by the same arithmetic a step takes")]
    return found[0] if found else None


def test_a_plan_with_servers_names_the_way_to_choose_all_times_and_the_break_even():
    """64 sequences on 8 servers: the rollout takes 15.6 s, training 2.9 s, and a last wave 2.9 s / 64 microbatches."""
    plan = dry_run(load(SERVERS))
    generation, training = plan.engines.seconds
    last = training / plan.num_microbatches[0]
    assert overlap_line() == (
        f"by the same arithmetic a step takes {generation + training:.0f} s in turns, {generation + last:.0f} s with "
        f"rollout.overlap=stream (the longer of both, and a last wave), {generation:.0f} s with rollout.ahead=1: "
        "choose rollout.overlap=stream, which stays on-policy, and gains as long as rollout and training both take "
        f"longer than its last wave of {last:.0f} s"
    )


@pytest.mark.parametrize(
    "overrides",
    [
        ("rollout.overlap=stream", "rollout.wave_microbatches=10000"),
        ("rollout.select=balance", "rollout.num_samples=2"),
    ],
    ids=["a wave as long as the step", "a selection"],
)
def test_where_streams_gain_nothing_or_are_not_possible_the_plan_names_the_step_ahead(overrides):
    line = overlap_line(*overrides)
    assert line is not None and line.endswith("if responses of weights that are one step old will do")
    assert ("rollout.overlap=stream" in line) == (overrides[0] == "rollout.overlap=stream")


def test_a_plan_is_silent_where_generation_and_training_must_take_turns():
    assert overlap_line("rollout.guidance=mixed", "target.anchor=student") is None


PARTIAL = ("rollout.extra_problems=32", "rollout.max_staleness=1")


def test_extra_problems_shorten_the_rollout_to_the_tokens_that_a_step_trains_on():
    """96 problems are under way, and 64 are finished in a step, so each step adds 2/3 of a mean response to each."""
    colocated = ("recipe=qwen3_8b", "data.global_batch_size=64")
    whole, parts = engines_of(*colocated), engines_of(*colocated, *PARTIAL)
    assert (whole.sequences, parts.sequences) == (8, 12)
    assert parts.seconds == pytest.approx((whole.seconds[0] / 3 * 64 / 96, whole.seconds[1]))
    full = ("recipe=qwen3_8b", "data.global_batch_size=512")
    more = engines_of(*full, "rollout.extra_problems=256", "rollout.max_staleness=1")
    assert more.sequences > more.full and engines_of(*full).sequences > more.full
    assert more.seconds[0] == pytest.approx(engines_of(*full).seconds[0] / 3)  # as many tokens in all


def continued_lines(*overrides: str) -> list[str]:
    return [line for line in summary(dry_run(load(overrides))) if "rollout.extra_problems" in line]


def test_a_plan_with_colocated_engines_names_the_seconds_of_continued_responses():
    colocated = ("recipe=qwen3_8b", "data.global_batch_size=64")
    (generation, training), parts = engines_of(*colocated).seconds, engines_of(*colocated, *PARTIAL).seconds[0]
    assert continued_lines(*colocated) == [
        f"by the same arithmetic a step takes {generation + training:.0f} s, and {parts + training:.0f} s with "
        "rollout.extra_problems=32 and rollout.max_staleness=1, if some tokens of weights that are one step old will do"
    ]
    lines = summary(dry_run(load(colocated)))
    assert not any("rollout.overlap" in line or "rollout.ahead" in line for line in lines)
    assert continued_lines(*colocated, *PARTIAL) == []
    assert continued_lines(*SERVERS) == []
    assert continued_lines("recipe=qwen3_8b", "rollout.guidance=mixed", "target.anchor=student") == []
