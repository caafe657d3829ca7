# Copyright (c) 2026 the megatron_selfdistill authors. Apache-2.0.
"""The memory figures of docs/tuning.md are those that a dry run prints."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
from tiers import combinations

from megatron_selfdistill.config import load
from megatron_selfdistill.data.prompts import DEFAULT_TEACHER_TEMPLATE
from megatron_selfdistill.instruments.plan.dry_run import dry_run
from megatron_selfdistill.instruments.plan.plan_tables import cells, seconds

PAGE = (Path(__file__).resolve().parents[4] / "docs" / "tuning.md").read_text()
ROWS = re.findall(r"^\| (?:none|`([^`|]+=[^`|]+)`) \| ([0-9.]+) \| ([0-9.]+) \|$", PAGE, re.MULTILINE)


def figures(*overrides: str) -> tuple[dict[str, str], tuple[str, str]]:
    """Return the parts and the two sums of one GPU of `recipe=qwen3_8b`."""
    [memory] = dry_run(load(["recipe=qwen3_8b", *overrides])).memory
    parts = {name: f"{size:.1f}" for name, size in (memory.rollout | memory.training).items()}
    return parts, (f"{memory.training_peak:.1f}", f"{memory.rollout_peak:.1f}")


@pytest.mark.full
@pytest.mark.parametrize(("keys", "training", "sampling"), ROWS, ids=[keys or "none" for keys, _, _ in ROWS])
def test_a_row_of_the_memory_table_is_what_the_plan_says(keys, training, sampling):
    assert figures(*keys.split())[1] == (training, sampling)


def test_the_printed_plan_is_what_the_plan_says():
    parts, sums = figures()
    printed = dict(re.findall(r"^  ([a-zA-Z=][a-zA-Z= ]*?) +([0-9.]+)$", PAGE, re.MULTILINE))
    assert printed == {
        **{name: size for name, size in parts.items() if size != "0.0"},
        "= while training": sums[0],
        "= while sampling": sums[1],
    }


def test_the_printed_time_of_a_step_is_what_the_plan_says():
    keys, printed = re.search(
        r"`(recipe=qwen3_8b [^`]*)`:\n\n<!-- time of a step -->\n```\n(.*?)```", PAGE, re.DOTALL
    ).groups()
    time = dry_run(load(keys.split())).time
    assert time is not None
    rows = [re.split(r" {2,}", line.strip()) for line in printed.splitlines()[2:]]
    assert rows[:-1] == [list(filter(None, cells(part)[:-1])) for part in time.parts]
    assert rows[-1] == ["= a step", seconds(time.seconds)]


HOURS = re.findall(r"^\| `recipe=(\w+)` \| ([0-9]+) \| (.*) \| ([0-9.]+) \|$", PAGE, re.MULTILINE)


@pytest.mark.parametrize(("recipe", "num_gpus", "settings", "hours"), HOURS, ids=[row[0] for row in HOURS])
def test_the_hours_of_a_recipe_are_the_arithmetic_of_the_plan(recipe, num_gpus, settings, hours):
    config = load([f"recipe={recipe}"])
    batch, steps = config.data.global_batch_size, config.num_steps
    assert str(config.cluster.num_gpus) == num_gpus and config.rollout.max_new_tokens == 4096
    assert settings == f"{batch} | {steps} | {batch * steps:,} | `{config.optimizer.lr:.0e}`".replace("e-0", "e-")
    (on_servers,) = re.findall(r"The GPUs of vLLM servers come on top \((.*?)\)", PAGE)
    assert (f"`{recipe}`" in on_servers) == (config.rollout.placement == "server")
    time = dry_run(config).time
    assert time is not None and f"{time.seconds * steps / 3600:.1f}" == hours


RECOMPUTED = "schedule.recompute.granularity=full schedule.recompute.method=uniform schedule.recompute.num_layers=1"
WAYS = ("", "adapter.rank=32", f"adapter.rank=32 {RECOMPUTED}")
"""The keys of the columns of the table about one GPU."""
TIED = "model.share_embeddings_and_output_weights=true"
SIZES = {
    "Qwen3-0.6B": f"num_layers=28 hidden_size=1024 ffn_hidden_size=3072 num_attention_heads=16 {TIED}",
    "Qwen3-1.7B": f"num_layers=28 hidden_size=2048 ffn_hidden_size=6144 num_attention_heads=16 {TIED}",
    "Qwen3-4B": f"hidden_size=2560 ffn_hidden_size=9728 {TIED}",
    "Qwen3-8B": "",
    "Qwen3-14B": "num_layers=40 hidden_size=5120 ffn_hidden_size=17408 num_attention_heads=40",
    "Qwen3-32B": "num_layers=64 hidden_size=5120 ffn_hidden_size=25600 num_attention_heads=64",
}
"""How the other sizes of Qwen3 differ from model=qwen3_8b."""
ONE_GPU = re.findall(r"^\| (Qwen3-[\d.]+B) \| (.*) \|$", PAGE, re.MULTILINE)


@combinations(model=[model for model, _ in ONE_GPU], quick={"model": ["Qwen3-8B"]}, strength=1)
def test_what_one_gpu_trains_is_what_the_plan_says(model):
    size = [key if "." in key else f"model.{key}" for key in SIZES[model].split()]
    found = []
    for way in WAYS:
        keys = ["cluster.num_gpus=1", "model=qwen3_8b", "rollout.max_new_tokens=2048", *size, *way.split()]
        plan = dry_run(load(keys))
        assert plan.max_length == 8192
        found.append("\u2013" if plan.misfit() else f"{plan.memory[0].training_peak:.1f}")
    assert " | ".join(found) == dict(ONE_GPU)[model]


def test_what_the_readme_says_about_the_cost_is_in_the_tables():
    readme = " ".join((Path(__file__).resolve().parents[4] / "README.md").read_text().split())
    (all_weights, adapters), (gpus, hours) = (
        re.search(pattern, readme).groups()
        for pattern in (
            r"one GPU of 80 GiB trains ([\d.]+) B parameters, or adapters of ([\d.]+) B",
            r"200 steps of Qwen3-8B take (\d+) H100 GPUs for \[([\d.]+) hours\]",
        )
    )
    rows = [(model, cells.split(" | ")) for model, cells in ONE_GPU]
    for named, column in ((all_weights, 0), (adapters, 1)):
        assert [model for model, cells in rows if cells[column] != "\u2013"][-1] == f"Qwen3-{named}B"
    assert [(row[1], row[3]) for row in HOURS if row[0] == "qwen3_8b"] == [(gpus, hours)]


def test_the_page_has_all_rows_and_the_length_of_the_default_wording():
    assert (len(ROWS), len(HOURS), len(ONE_GPU)) == (10, 6, 6)
    assert f"has {len(DEFAULT_TEACHER_TEMPLATE) - len('{problem}{solution}')} characters of its own" in PAGE
