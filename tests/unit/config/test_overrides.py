# Copyright (c) 2026 the megatron_selfdistill authors. Apache-2.0.
"""Odd command lines and odd files of a lab are one message, and nothing is accepted without effect."""

from __future__ import annotations

from pathlib import Path

import pytest

from megatron_selfdistill.config import given_keys, load
from megatron_selfdistill.errors import ConfigError

GLOBAL = "# @package _global_\n"


def message_of(*overrides: str, lab: Path | None = None) -> str:
    """Return the one sentence with which these overrides fail."""
    with pytest.raises(ConfigError) as caught:
        print("accepted:", load(list(overrides), search_path=[str(lab)] if lab else []))
    text = str(caught.value)
    assert text and "\n" not in text and len(text) < 1200
    return text


@pytest.fixture
def lab(tmp_path) -> Path:
    """Return a directory of a lab with recipes that cannot be read."""
    recipes = tmp_path / "recipe"
    recipes.mkdir()
    (recipes / "latin.yaml").write_bytes(GLOBAL.encode() + "# café\nnum_steps: 3\n".encode("latin-1"))
    for name, text in {
        "mine": "defaults: [mine]\nnum_steps: 3\n",
        "asks": "defaults: [nope, _self_]\nnum_steps: 3\n",
        "asks_group": "defaults: [_self_, default, {override /model: nope}]\n",
        "scalar_section": "optimizer: fp32\n",
        "list": "- a\n- b\n",
        "null_key": "null: 3\n",
        "deep": "rollout: {engine_args: {a: " + "[" * 2000 + "]" * 2000 + "}}\n",
        "many_digits": "num_steps: 0x" + "f" * 6000 + "\n",
    }.items():
        (recipes / f"{name}.yaml").write_text(GLOBAL + text)
    (recipes / "marked.yaml").write_text("\ufeff" + GLOBAL + "num_steps: 3\n", encoding="utf-8")
    return tmp_path


@pytest.mark.parametrize(
    ("recipe", "words"),
    [
        ("latin", "cannot be read: 'utf-8' codec can't decode byte 0xe9 in position"),
        ("mine", "a file or a value of the configuration cannot be read: maximum recursion depth"),
        ("asks", "In 'recipe/asks': Could not load 'recipe/nope'"),
        ("asks_group", "Could not find 'model/nope'"),
        ("nope", "Could not find 'recipe/nope'"),
        ("scalar_section", "optimizer must be a mapping of the keys of this section, got 'fp32'"),
        ("list", "In 'recipe/list': ConfigTypeError raised while composing config: Cannot merge"),
        ("null_key", "Incompatible key type 'NoneType'"),
        pytest.param("deep", "a file or a value of the configuration cannot be read", marks=pytest.mark.full),
        ("many_digits", "Exceeds the limit (4300 digits) for integer string conversion"),
        ("marked", "a file of the group recipe must begin with the line `# @package _global_`"),
    ],
)
def test_a_recipe_that_cannot_be_read_is_one_sentence_with_the_fault(lab, recipe, words):
    assert words.format(lab=lab) in message_of(f"recipe={recipe}", lab=lab)


@pytest.mark.parametrize(
    ("overrides", "words"),
    [
        (["recipe=grpo", "recipe=sdft"], "recipe=grpo and recipe=sdft each choose a file of the group recipe"),
        (["recipe=grpo", "+recipe=sdft"], "a run takes one: remove one of them"),
        (["model=tiny", "model=qwen3_8b"], "model=tiny and model=qwen3_8b each choose a file of the group model"),
        (["~recipe"], "~recipe: expected a group or an entry of a mapping, such as ~model.transformer.NAME"),
        (["~recipe=default"], "~recipe=default: expected a group or an entry of a mapping"),
        (["model.yarn.mscal=2"], "model.yarn has no entry 'mscal': its entries are rotary_scaling_factor, original"),
        (["metrics={consoles: 2}"], "unknown configuration key 'metrics.consoles'"),
        (["schedule.recompute={layers: 2}"], "its entries are granularity, method, num_layers, modules"),
        (["schedule.recompute=null"], "schedule.recompute must be a mapping of the keys of this section, got None"),
        (["optimizer.constants=3"], "optimizer.constants must be a mapping of the keys of this section, got 3"),
        (["~model.yarn.mscale"], "~model.yarn.mscale: expected a group or an entry of a mapping"),
        (["~optimizer.lr"], "~optimizer.lr: expected a group or an entry of a mapping"),
        (["~num_steps=100"], "~num_steps=100: expected a group or an entry of a mapping"),
        (["hydra.verbose=true"], "hydra.verbose=true has no effect"),
        (["+hydra.job.name=x"], "+hydra.job.name=x has no effect"),
        (["hydra/launcher=basic"], "hydra/launcher=basic has no effect"),
        (["recipe=null"], "recipe=null: expected the name of a file, one of beta_opsd, caopd"),
        (["recipe="], "recipe=: expected the name of a file"),
        (["rollout=3"], "rollout=3: expected the name of a file, one of sampled"),
        (["recipe=[grpo,sdft]"], "recipe=[grpo,sdft]: expected the name of a file"),
        (["rollout=[]"], "rollout=[]: expected the name of a file"),
        (["optimizer=${rollout}"], "optimizer=${rollout}: expected the name of a file, one of fp32, overlapped"),
        (["recipe=recipe/grpo"], "Could not find 'recipe/recipe/grpo'"),
        (["=3"], "expected key=value, got '=3'"),
        ([""], "expected key=value, got ''"),
        (["num_steps=" + "9" * 5000], "the value of num_steps cannot be read (Exceeds the limit (4300 digits)"),
        (
            ["rollout.stop_token_ids=[" + ",".join("1" * 20_000) + "]"],
            "more than the 10000 that a command line may have",
        ),
        (["seed=???"], "seed must be a whole number, at least 0 and at most 4294967295, got '???'"),
        (["num_steps="], "num_steps must be a whole number, at least 1 and at most 2147483647, got ''"),
        (["num_steps=null"], "num_steps must be a whole number, at least 1 and at most 2147483647, got None"),
        (["num_steps='٣'"], "num_steps must be a whole number"),
        (["dry_run=2"], "dry_run must be true or false, got 2"),
        (["checkpoint.resume=1"], "checkpoint.resume must be one of true, false, force, got 1"),
        (["optimizer.lr=" + "9" * 400], "optimizer.lr must be a number, at least 0 and at most 100, got 9999"),
        (["rollout={engine: [1]}"], "rollout.engine must be one of megatron, vllm, got [1]"),
        (["data.fields={problem: [1]}"], "data.fields.problem must be a text, got [1]"),
        (["rollout.transfer_dir="], "rollout.transfer_dir must be a path that is not empty, got ''"),
        (["data.split="], "data.split must be a text that is not empty, got ''"),
        (["data.system_prompt=\udcff"], "data.system_prompt must be a text, or null, got '\\udcff'"),
        (["adapter.rank=2", "adapter.layers=[linear_qkv,linear_qkv]"], "'linear_qkv' stands there twice"),
        (["adapter.rank=2", "adapter.layers=[linear_qvk]"], "got 'linear_qvk'; did you mean 'linear_qkv'?"),
        (["guards.entropy.max_ratio=-1"], "guards.entropy.max_ratio must be at least 0, or null, got -1"),
        (["rollout.temperature=1e-30"], "rollout.temperature must be 0 (greedy) or at least 0.01, got 1e-30"),
    ],
)
def test_an_odd_command_line_is_one_sentence(overrides, words):
    assert words in message_of(*overrides)


@pytest.mark.parametrize(
    ("override", "words"),
    [
        ("seed=${seed}", "seed: Recursive interpolation detected"),
        ("seed=${nothing}", "seed: Interpolation key 'nothing' not found"),
        ("run_dir=${", "Error merging override run_dir='${': no viable alternative at input '${'"),
        (
            "run_dir=${oc.env:MISSING}",
            "run_dir: expected the environment variable MISSING, which is not set: export it",
        ),
        ("rollout.servers=${data.split}", "rollout.servers must be a list of different entries, each a text"),
        ("rollout.stop_token_ids=${data.split}", "rollout.stop_token_ids must be a list, each a whole number"),
        ("model.transformer.a.b=${nothing}", "model.transformer.a.b: Interpolation key 'nothing' not found"),
    ],
)
def test_an_interpolation_that_gives_nothing_is_one_sentence(monkeypatch, override, words):
    monkeypatch.delenv("MISSING", raising=False)
    assert words in message_of(override)


def test_what_has_an_effect_is_accepted(lab):
    config = load(
        [
            *("num_steps=3", "num_steps=4", "model={num_layers: 5}", "model=tiny", "model=tiny"),
            *(
                "model.transformer.a=1",
                "model.transformer.b=2",
                "~model.transformer.a",
                f"hydra.searchpath=[file://{lab}]",
            ),
        ]
    )
    assert config.num_steps == 4, "the last value of a key holds"
    assert (config.model.num_layers, config.model.hidden_size) == (5, 64)
    assert config.model.transformer == {"b": 2}


def test_the_file_of_a_group_that_a_configuration_chooses_can_be_removed():
    chosen, removed = load([], "quickstart"), load(["~model"], "quickstart")
    assert (chosen.model.normalization, removed.model.normalization) == ("LayerNorm", "RMSNorm")


def test_a_removed_mapping_is_a_given_key():
    assert "data.fields" in given_keys(["~data.fields"]) and load(["~data.fields"]).data.fields == {}
