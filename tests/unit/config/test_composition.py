# Copyright (c) 2026 the megatron_selfdistill authors. Apache-2.0.
"""The schema documents every key, and YAML files and the command line compose a configuration of it."""

from __future__ import annotations

import dataclasses
import operator

import pytest
from omegaconf import OmegaConf
from tiers import combinations
from tiny import needed_by

from megatron_selfdistill.config import Config, compose, keys, load
from megatron_selfdistill.config.key_list import config_dir
from megatron_selfdistill.config.schema.ranges import AnyText, taken_apart

SHIPPED = {str(p.relative_to(config_dir())): p.relative_to(config_dir()) for p in sorted(config_dir().glob("*/*.yaml"))}
QUICK_RECIPES = ("default", "sdpo", "qwen3_8b")


def test_every_key_has_a_documentation():
    assert all(len(key.doc) >= 5 for key in keys().values())


@pytest.mark.full
@pytest.mark.parametrize(
    "overrides",
    [
        ["num_steps=3", "model.num_layers=3", "data.fields={problem: a}", "data.fields.solution=b"],
        ["+model.transformer.x=3", "model.num_layers=5", "model={num_layers: 2}", "optimizer.lr=${target.k}"],
        ["+model.transformer={x: 3}", "~model.transformer.x", "method.name=sod", "rollout.servers=[a]"],
        ["~optimizer", "recipe=grpo", "method.weight=0.5"],
    ],
)
def test_overrides_of_files_composed_before_give_what_hydra_gives(overrides):
    expected = OmegaConf.to_container(compose._by_hydra("train", *overrides), resolve=False)
    for _ in range(2):
        assert compose._composed(overrides, "train", ()) == compose._set_values(expected)


def test_the_composed_defaults_are_the_schemas_also_after_a_change_of_other_ones():
    load().metrics.loggers.append("wandb")
    load().model.transformer["x"] = 3
    assert load() == Config()


@combinations(
    file=SHIPPED,
    quick={"file": [name for name, p in SHIPPED.items() if p.parts[0] != "recipe" or p.stem in QUICK_RECIPES]},
    strength=1,
)
def test_every_shipped_file_composes_and_sets_what_it_says(file):
    group, option = file.parts[0], file.stem
    overrides = [f"{group}={option}", *(needed_by(option) if group == "recipe" else [])]
    config = dataclasses.asdict(load(overrides))
    if group == "recipe":
        assert load([*overrides, "model=tiny"]).model.hidden_size == 64, "with every recipe a model can be chosen"
    written = OmegaConf.to_container(OmegaConf.load(config_dir() / file))
    target = config if "_global_" in (config_dir() / file).read_text() else config[group]
    written.pop("defaults", None)
    assert written, "a file that sets nothing"
    assert_contains(target, written)


def assert_contains(values: dict, part: dict) -> None:
    for key, value in part.items():
        if isinstance(value, dict):
            assert_contains(values[key], value)
        else:
            assert values[key] == value, key


def test_a_labs_directory_adds_groups_and_options(tmp_path):
    for name, text in {"model/ours": "num_layers: 6", "cluster/big": "# @package _global_\nnum_steps: 7"}.items():
        (tmp_path / name).parent.mkdir()
        (tmp_path / f"{name}.yaml").write_text(text)
    config = load(["model=ours", "+cluster=big"], search_path=[tmp_path])
    assert (config.model.num_layers, config.num_steps) == (6, 7)
    assert load(["model=ours", "+cluster=big", f"hydra.searchpath=[file://{tmp_path}]"]) == config
    assert load(["recipe=literal"], search_path=[tmp_path]).teacher.weights == "current"
    assert load().model.num_layers == 2, "the lab's directory is forgotten by the next call"


TEXTS = (
    *("a=b.jsonl", "(old) x.jsonl", "a,b.jsonl", "[x].jsonl", "it's.jsonl", 'say "it\'s".jsonl', "日本 😀.jsonl"),
    *("123", "true", "1e3", "{a}", "a\\'b", "ends\\", "*.jsonl", "choice(a,b)"),
)
TEXT_KEYS = "data.path data.tokenizer data.chat_template data.system_prompt evaluation.path".split()
BELOW_A_DIRECTORY = "run_dir checkpoint.load rollout.hf_config rollout.transfer_dir rollout.server_python".split()


@pytest.mark.parametrize("first", range(0, len(TEXTS), 5))
def test_a_text_is_taken_as_it_stands(first):
    texts = TEXTS[first : first + 5]
    expected = dict(zip(TEXT_KEYS, texts, strict=True))
    expected |= dict(zip(BELOW_A_DIRECTORY, (f"runs/{text}" for text in texts), strict=True))
    config = OmegaConf.create(dataclasses.asdict(load([f"{key}={text}" for key, text in expected.items()])))
    assert {key: OmegaConf.select(config, key) for key in expected} == expected


def test_a_text_that_hydra_reads_as_one_keeps_hydras_rules(monkeypatch):
    monkeypatch.setenv("SOME_DIRECTORY", "/there")
    texts = {"'a,b'": "a,b", "a\\,b": "a,b", "null": None, "${oc.env:SOME_DIRECTORY}/x": "/there/x"}
    assert {text: load([f"data.path={text}"]).data.path for text in texts} == texts


def test_a_tilde_in_a_path_is_the_home_directory(monkeypatch, tmp_path):
    monkeypatch.setenv("HOME", "/home/me")
    paths = [key for key, (*_, kind) in keys().items() if AnyText("a path", is_path=True) in taken_apart(kind)[1]]
    assert {"run_dir", "data.path", "checkpoint.load", "rollout.hf_config"} <= set(paths)
    config = load([f"{key}=~/x" for key in paths])
    for key in paths:
        section, _, name = key.rpartition(".")
        assert getattr(getattr(config, section) if section else config, name) == "/home/me/x", key
    (tmp_path / "data").mkdir()
    (tmp_path / "data" / "ours.yaml").write_text("path: ~/y\n")
    assert load(["data=ours"], search_path=[tmp_path]).data.path == "/home/me/y"
    assert load(["data.student_template=~{problem}"]).data.student_template == "~{problem}", "no path"


def test_no_text_is_null():
    apart = {name: taken_apart(key.kind) for name, key in keys().items()}
    optional = [name for name, (plain, _, nullable) in apart.items() if (plain, nullable) == (str, True)]
    assert {"data.path", "data.tokenizer", "checkpoint.load", "rollout.hf_config"} <= set(optional)
    config = load([f"{key}=" for key in optional])
    for key in optional:
        assert operator.attrgetter(key)(config) is None, key
