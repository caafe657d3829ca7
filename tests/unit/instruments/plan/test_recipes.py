# Copyright (c) 2026 the megatron_selfdistill authors. Apache-2.0.
"""Every recipe for a real size passes the dry run, is the published model, and has its row on the page of sizes."""

from __future__ import annotations

import dataclasses
import functools
import re
from collections.abc import Iterable
from pathlib import Path

import pytest
import yaml
from recipe_needs import needed_by
from scripts import load_script
from tiers import combinations

from megatron_selfdistill.config import Config, load
from megatron_selfdistill.config.key_list import config_dir
from megatron_selfdistill.config.schema.adapter_config import AdapterConfig
from megatron_selfdistill.instruments.plan.dry_run import Plan, dry_run

size_table = load_script(Path(__file__).resolve().parents[4] / "tools" / "size_table.py")

# Of the checkpoints on the hub, to the parameter, without second-token layers and expert biases; of GLM-4.5-Air and
# Kimi-K2 as transformers counts their config.json.
PUBLISHED = {
    "qwen3_8b": 8_190_735_360,
    "qwen3_32b": 32_762_123_264,
    "llama31_405b": 405_853_388_800,
    "qwen3_235b_a22b": 235_093_634_560,
    "gpt_oss_120b": 116_829_156_672,
    "deepseek_v3": 671_026_404_352,
    "glm45_air": 106_852_245_504,
    "kimi_k2": 1_026_408_209_408,
}
_ADAPTED = ("qwen3_32b_lora", "llama31_405b_lora", "deepseek_v3_lora", "glm45_air_lora", "kimi_k2_lora")
PUBLISHED |= {recipe: PUBLISHED[recipe.removesuffix("_lora")] for recipe in _ADAPTED}
GPUS = {
    "qwen3_8b": 8,
    "qwen3_32b": 32,
    "qwen3_32b_lora": 8,
    "llama31_405b": 256,
    "qwen3_235b_a22b": 128,
    "gpt_oss_120b": 64,
    "deepseek_v3": 512,
    "llama31_405b_lora": 16,
    "deepseek_v3_lora": 32,
    "glm45_air": 64,
    "glm45_air_lora": 8,
    "kimi_k2": 512,
    "kimi_k2_lora": 64,
}
REAL_SIZES = sorted(PUBLISHED)


QUICK = ("qwen3_8b", "qwen3_32b", "qwen3_32b_lora", "gpt_oss_120b")
"""A recipe of each kind: dense, with pipeline stages, with adapters, with experts.  Plans of larger models, and of
latent attention, take seconds each."""


def each(recipes: Iterable[str]) -> pytest.MarkDecorator:
    """Parametrize over ``recipes``; in make test over those of `QUICK`."""
    cases = [pytest.param(recipe, marks=() if recipe in QUICK else pytest.mark.full) for recipe in recipes]
    return pytest.mark.parametrize("recipe", cases)


@functools.cache
def config_of(recipe: str) -> Config:
    return load([f"recipe={recipe}", *needed_by(recipe)])


@functools.cache
def plan_of(recipe: str) -> Plan:
    return dry_run(config_of(recipe))


def test_every_shipped_recipe_that_names_its_gpus_is_tested_here():
    shipped = {path.stem: yaml.safe_load(path.read_text()) for path in (config_dir() / "recipe").glob("*.yaml")}
    assert sorted(name for name, values in shipped.items() if "num_gpus" in values.get("cluster", {})) == REAL_SIZES


@each(REAL_SIZES)
def test_a_recipe_fits_its_gpus_with_some_to_spare(recipe):
    plan = plan_of(recipe)
    assert plan.config.cluster.num_gpus == GPUS[recipe]
    assert plan.misfit() is None
    assert max(memory.peak for memory in plan.memory) < 0.95 * plan.config.cluster.memory_of_gpu


@combinations(
    recipe=sorted({p.stem for p in (config_dir() / "recipe").glob("*.yaml")} - set(REAL_SIZES)),
    quick={"recipe": ["chat_logs", "grpo"]},
    strength=1,
)
def test_a_recipe_without_a_size_passes_the_dry_run_at_one(recipe):
    size = ["cluster.num_gpus=8", "model=qwen3_8b", "parallel=node_of_8"]
    plan = dry_run(load([f"recipe={recipe}", *size, *needed_by(recipe)]))
    assert plan.misfit() is None and plan.parameters == PUBLISHED["qwen3_8b"]


@each(REAL_SIZES)
def test_parameters_are_those_of_the_published_model(recipe):
    assert plan_of(recipe).parameters == PUBLISHED[recipe]


@each(REAL_SIZES)
def test_the_page_of_sizes_has_the_row_that_its_script_writes(recipe):
    assert size_table.row(recipe, plan_of(recipe)) in size_table.PAGE.read_text(encoding="utf-8").splitlines()


def test_the_page_of_sizes_has_a_row_for_every_recipe_and_no_other():
    table = size_table.PAGE.read_text(encoding="utf-8").partition(size_table.BEGIN)[2].partition(size_table.END)[0]
    heading, _, *rows = table.strip().splitlines()
    assert heading == f"| {' | '.join(size_table.HEADINGS)} |"
    assert [row.split("`")[1] for row in rows] == REAL_SIZES == size_table.recipes()


@pytest.mark.full
def test_the_page_about_tuning_has_the_planned_memory_and_hours():
    page = (size_table.PAGE.parents[1] / "tuning.md").read_text(encoding="utf-8")
    rows = re.findall(r"^\| (none|`[^|]*`) \| (\d+\.\d) \| (\d+\.\d) \|$", page, re.MULTILINE)
    for keys, *figures in rows:
        plan = dry_run(load(["recipe=qwen3_8b", *keys.replace("none", "").strip("`").split()]))
        peaks = [max(getattr(one, f"{what}_peak") for one in plan.memory) for what in ("training", "rollout")]
        assert figures == [f"{peak:.1f}" for peak in peaks], keys
    hours = re.findall(r"^\| `recipe=(\w+)` .*\| ([\d.]+) \|$", page, re.MULTILINE)
    assert (len(rows), len(hours)) == (10, 6)
    for name, shown in hours:
        plan = plan_of(name)
        assert shown == f"{plan.config.num_steps * sum(part.seconds for part in plan.parts) / 3600:.1f}", name


@each(_ADAPTED)
def test_adapters_need_fewer_gpus_than_all_weights_and_send_a_hundredth(recipe):
    adapted, whole = plan_of(recipe), plan_of(recipe.removesuffix("_lora"))
    assert 4 * GPUS[recipe] <= GPUS[recipe.removesuffix("_lora")]
    assert adapted.config.optimizer.lr == pytest.approx(10 * whole.config.optimizer.lr)
    sent = [plan_of(name).update_bytes for name in (recipe, recipe.removesuffix("_lora"))]
    assert 100 * sent[0] < sent[1]
    all_weights = dry_run(dataclasses.replace(adapted.config, adapter=AdapterConfig()))
    assert all_weights.misfit() is not None, "the recipe's layout would hold all weights too"


def test_a_recipe_is_the_default_one_at_another_size():
    default, real = load(), config_of("qwen3_8b")
    assert (real.target, real.loss, real.guards) == (default.target, default.loss, default.guards)
    assert real.teacher.weights == default.teacher.weights


@pytest.mark.parametrize("recipe", ["qwen3_8b"])
def test_a_group_wins_over_a_recipes_own_values(recipe, tmp_path):
    (tmp_path / "parallel").mkdir()
    (tmp_path / "parallel" / "two.yaml").write_text("tensor_model_parallel_size: 2\n")
    config = load([f"recipe={recipe}", "parallel=two"], search_path=[tmp_path])
    assert config.parallel.tensor_model_parallel_size == 2


def test_a_model_chosen_on_the_command_line_keeps_nothing_of_the_recipes():
    config = load(["recipe=qwen3_8b", "model=llama_1b", "target=strict"])
    assert config.model == load(["model=llama_1b"]).model
    assert config.target.k_max is None
