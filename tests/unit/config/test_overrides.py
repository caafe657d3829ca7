# Copyright (c) 2026 the megatron_selfdistill authors. Apache-2.0.
"""Odd command lines are one message with the key, and the last value of a key holds."""

from __future__ import annotations

import pytest

from megatron_selfdistill.config import keys, load
from megatron_selfdistill.config.key_list import SHORT, groups
from megatron_selfdistill.errors import ConfigError


@pytest.mark.parametrize(
    ("override", "named"),
    [
        ("model.num_layer=3", "'model.num_layers'"),
        ("target.lr=1e-6", "'optimizer.lr'"),
        ("recepie=literal", "'recipe'"),
        ("metrics={consoles: 2}", "'metrics.consoles'"),
        ("method.wieght=2", "'method.wieght'"),
        ("recipe=literl", "'recipe': beta_opsd"),
        ("model=hf", "model=./DIR"),
        ("model=a/b", "checkpoint.load=DIR"),
        ("train", "key=value"),
        ("num_steps=1,2", "num_steps"),
        ("rollout.servers=a=b", "'rollout.servers=\"a=b\"'"),
        ("num_steps=" + "9" * 5000, "4300 digits"),
        ("optimizer.lr=" + "9" * 400, "too large"),
        ("seed=${seed}", "seed"),
        ("run_dir=${oc.env:MISSING}", "run_dir"),
    ],
)
def test_a_misspelt_or_odd_override_is_refused_with_the_nearest_name_or_its_own(monkeypatch, override, named):
    monkeypatch.delenv("MISSING", raising=False)
    with pytest.raises(ConfigError) as caught:
        print("accepted:", load(["seed=1", override]))
    text = str(caught.value)
    assert named in text and "\n" not in text and len(text) < 1200


@pytest.mark.parametrize(
    ("file", "content", "named"),
    [
        ("recipe", "# @package _global_\ndefaults: [nope, _self_]\n", "recipe/nope"),
        ("recipe", "# @package _global_\nlearning_rate: 3\n", "'learning_rate'"),
        ("model", "num_layers: 3\nhiden_size: 32\n", "'model.hidden_size'"),
    ],
)
def test_a_fault_in_a_file_of_a_lab_is_refused_with_the_file_and_the_name(tmp_path, file, content, named):
    (tmp_path / file).mkdir()
    (tmp_path / file / "ours.yaml").write_text(content)
    with pytest.raises(ConfigError) as caught:
        load([f"{file}=ours"], search_path=[tmp_path])
    assert named in str(caught.value) and f"'{file}/ours'" in str(caught.value) and "\n" not in str(caught.value)
    with pytest.raises(ConfigError, match=r"--config-dir .*nowhere"):
        load([f"{file}=ours"], search_path=[tmp_path / "nowhere"])


def test_the_last_value_holds_and_an_entry_and_a_file_can_be_removed():
    config = load(["steps=3", "num_steps=4", "model={num_layers: 5}", "model=qwen3_8b", "model=tiny"])
    assert (config.num_steps, config.model.num_layers, config.model.hidden_size) == (4, 5, 64)
    removed = load(["model.transformer.a=1", "model.transformer.b=2", "~model.transformer.a"])
    assert removed.model.transformer == {"b": 2}
    chosen, removed = load([], "quickstart"), load(["~model"], "quickstart")
    assert (chosen.model.normalization, removed.model.normalization) == ("LayerNorm", "RMSNorm")


def test_every_short_name_sets_its_key_and_is_no_key_itself():
    config = load(["tp=2", "batch=64", "logger=wandb"])
    assert (config.parallel.tensor_model_parallel_size, config.data.global_batch_size) == (2, 64)
    assert config.metrics.loggers == ["wandb"]
    assert set(SHORT.values()) <= keys().keys() and not SHORT.keys() & (keys().keys() | groups().keys())
