# Copyright (c) 2026 the megatron_selfdistill authors. Apache-2.0.
"""The recipes of real sizes: their models, and the GPUs on which the planner fits them."""

from __future__ import annotations

import dataclasses
import functools

import pytest
import yaml
from tiers import combinations
from tiny import needed_by

from megatron_selfdistill.config import Config, load
from megatron_selfdistill.config.key_list import config_dir
from megatron_selfdistill.config.schema.adapter_config import AdapterConfig
from megatron_selfdistill.instruments.plan.dry_run import Plan, dry_run

# The GPUs of a recipe, and the parameters of the checkpoint on the hub, without second-token layers and expert biases;
# those of GLM-4.5-Air and Kimi-K2 as transformers counts their config.json.
SIZES = {
    "qwen3_8b": (8, 8_190_735_360),
    "qwen3_32b": (32, 32_762_123_264),
    "llama31_405b": (256, 405_853_388_800),
    "qwen3_235b_a22b": (128, 235_093_634_560),
    "gpt_oss_120b": (64, 116_829_156_672),
    "deepseek_v3": (512, 671_026_404_352),
    "glm45_air": (64, 106_852_245_504),
    "kimi_k2": (512, 1_026_408_209_408),
}
GPUS_WITH_ADAPTERS = {"qwen3_32b": 8, "llama31_405b": 16, "deepseek_v3": 32, "glm45_air": 8, "kimi_k2": 64}
SIZES |= {f"{recipe}_lora": (gpus, SIZES[recipe][1]) for recipe, gpus in GPUS_WITH_ADAPTERS.items()}
SHIPPED = {path.stem: yaml.safe_load(path.read_text()) for path in (config_dir() / "recipe").glob("*.yaml")}
# Dense with adapters, and with experts and pipeline stages.  Plans of larger models take seconds each.
QUICK = ["qwen3_8b", "qwen3_32b_lora", "gpt_oss_120b"]


@functools.cache
def plan_of(recipe: str) -> Plan:
    return dry_run(load([f"recipe={recipe}", *needed_by(recipe)]))


def test_every_shipped_recipe_that_names_its_gpus_is_tested_here():
    assert {name for name, values in SHIPPED.items() if "num_gpus" in values.get("cluster", {})} == SIZES.keys()


@combinations(recipe=sorted(SIZES), quick={"recipe": QUICK}, strength=1)
def test_a_recipe_has_the_published_model_and_fits_its_gpus_with_some_to_spare(recipe):
    plan = plan_of(recipe)
    assert (plan.config.cluster.num_gpus, plan.parameters) == SIZES[recipe]
    assert plan.misfit() is None
    assert max(memory.peak for memory in plan.memory) < 0.95 * plan.config.cluster.memory_of_gpu


@combinations(recipe=sorted(SHIPPED.keys() - SIZES.keys()), quick={"recipe": ["chat_logs", "grpo"]}, strength=1)
def test_a_recipe_without_a_size_passes_the_dry_run_at_one(recipe):
    size = ["cluster.num_gpus=8", "model=qwen3_8b", "parallel=node_of_8"]
    plan = dry_run(load([f"recipe={recipe}", *size, *needed_by(recipe)]))
    assert plan.misfit() is None and plan.parameters == SIZES["qwen3_8b"][1]


@combinations(recipe=list(GPUS_WITH_ADAPTERS), quick={"recipe": ["qwen3_32b"]}, strength=1)
def test_adapters_need_fewer_gpus_than_all_weights_and_send_a_hundredth(recipe):
    adapted, whole = plan_of(f"{recipe}_lora"), plan_of(recipe)
    assert 4 * SIZES[f"{recipe}_lora"][0] <= SIZES[recipe][0]
    assert adapted.config.optimizer.lr == pytest.approx(10 * whole.config.optimizer.lr)
    assert 100 * adapted.update_bytes < whole.update_bytes
    all_weights = dry_run(dataclasses.replace(adapted.config, adapter=AdapterConfig()))
    assert all_weights.misfit() is not None, "the recipe's layout would hold all weights too"


def test_a_recipe_is_the_default_one_at_another_size():
    default, real = Config(), plan_of("qwen3_8b").config
    assert (real.target, real.loss, real.guards) == (default.target, default.loss, default.guards)
    assert real.teacher.weights == default.teacher.weights
