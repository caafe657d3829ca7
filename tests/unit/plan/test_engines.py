# Copyright (c) 2026 the megatron_selfdistill authors. Apache-2.0.
"""The load of the engines of a plan: the arithmetic, the warning, and the effect of its advice."""

from __future__ import annotations

import functools
import re

import pytest

from megatron_selfdistill.config import load
from megatron_selfdistill.plan.dry_run import dry_run
from megatron_selfdistill.plan.engines import BALANCE, Engines
from megatron_selfdistill.plan.plan_tables import summary
from megatron_selfdistill.train import main

RECIPES = ["qwen3_8b", "qwen3_32b", "llama31_405b", "qwen3_235b_a22b", "deepseek_v3"]


@functools.cache
def engines_of(*overrides: str) -> Engines:
    found = dry_run(load(overrides)).engines
    assert found is not None
    return found


@pytest.mark.parametrize("recipe", RECIPES)
def test_no_recipe_leaves_its_engines_idle(recipe):
    assert engines_of(f"recipe={recipe}").warning is None


def test_a_rollout_takes_the_reads_of_all_weights_for_each_token_whatever_the_batch():
    few, many = engines_of("recipe=qwen3_8b", "data.global_batch_size=64"), engines_of("recipe=qwen3_8b")
    assert (few.count, few.sequences, many.sequences) == (8, 8, 64)
    # 8.19e9 parameters of 2 bytes at 4.3e12 bytes per second, 4096 times; the cache holds 56 of the 64 at a time.
    assert few.seconds[0] == pytest.approx(8.190735e9 * 2 / 4.3e12 * 4096, rel=1e-3)
    assert many.seconds[0] == pytest.approx(few.seconds[0] * 64 / many.capacity)
    # 8 FLOPs (forward, backward, the teacher's forward), a third of 4096 tokens, 8 GPUs at 40 %.
    training = 8 * 8.190735e9 * 64 * 4096 / 3 / (8 * 780e12 * 0.4)
    assert few.seconds[1] == pytest.approx(training, rel=1e-3)
    assert many.seconds[1] == pytest.approx(8 * training, rel=1e-3)


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
    assert engines_of(*few, "rollout.guidance=mixed").sequences == 16


@pytest.mark.parametrize(
    ("recipe", "cache_gb", "kib"),
    [("qwen3_8b", 16, 144), ("qwen3_32b", 10, 64), ("qwen3_235b_a22b", 16, 47), ("deepseek_v3", 16, 68.625)],
)
def test_a_cache_holds_the_mean_sequence_half_written(recipe, cache_gb, kib):
    """The prompt a third of 4096 tokens, the response a third of 4096 and half of it written."""
    held = (4096 + 2048) / 3
    found = engines_of(f"recipe={recipe}", f"rollout.kv_cache_gb={cache_gb}").capacity
    assert found == int(cache_gb * 2**20 / kib / held)


def test_a_mixture_of_experts_reads_more_than_it_computes():
    assert engines_of("recipe=qwen3_8b").balance == pytest.approx(BALANCE)
    assert engines_of("recipe=qwen3_235b_a22b").balance == pytest.approx(BALANCE * 235.09 / 22.19, rel=0.01)
    assert engines_of("recipe=deepseek_v3").balance == pytest.approx(BALANCE * 671.03 / 37.5, rel=0.02)


def test_the_plan_prints_how_full_the_engines_are_and_the_warning(capsys):
    assert main(["recipe=qwen3_8b", "data.global_batch_size=64", "dry_run=true"]) == 0
    out = capsys.readouterr().out
    assert "\n8 sequences per engine and step; its KV cache holds about 56 at a time" in out
    assert "16 s of rollout and 2 s of training per step\nwarning: 8 sequences per engine" in out
    assert "raise data.global_batch_size to 512" in out


@pytest.mark.parametrize("override", ["rollout.engine=megatron", "recipe=chat_logs"])
def test_without_vllm_there_is_nothing_to_fill(override):
    plan = dry_run(load(["cluster.num_gpus=8", "model=qwen3_8b", "parallel=node_of_8", override]))
    assert plan.engines is None and not any("sequences per engine" in line for line in summary(plan))
