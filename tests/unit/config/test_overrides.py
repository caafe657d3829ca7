# Copyright (c) 2026 the megatron_selfdistill authors. Apache-2.0.
"""Odd command lines and odd files of a lab are one message, and the last value of a key holds."""

from __future__ import annotations

from pathlib import Path

import pytest

from megatron_selfdistill.config import keys, load
from megatron_selfdistill.config.key_list import SHORT, groups
from megatron_selfdistill.errors import ConfigError

GLOBAL = "# @package _global_\n"


def message_of(*overrides: str, lab: Path | None = None) -> str:
    """Return the one sentence with which these overrides fail."""
    with pytest.raises(ConfigError) as caught:
        print("accepted:", load(list(overrides), search_path=[str(lab)] if lab else []))
    text = str(caught.value)
    assert text and "\n" not in text and len(text) < 1200
    return text


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("defaults: [nope, _self_]\n", "In 'recipe/ours': Could not load 'recipe/nope'"),
        ("learning_rate: 3\n", "In 'recipe/ours': unknown configuration key 'learning_rate'"),
    ],
)
def test_a_recipe_that_cannot_be_read_is_one_sentence_with_the_fault(tmp_path, text, words):
    (tmp_path / "recipe").mkdir()
    (tmp_path / "recipe" / "ours.yaml").write_text(GLOBAL + text)
    assert words in message_of("recipe=ours", lab=tmp_path)


@pytest.mark.parametrize(
    ("override", "words"),
    [
        ("metrics={consoles: 2}", "unknown configuration key 'metrics.consoles'"),
        ("method.wieght=2", "'method.wieght'; did you mean 'method."),
        ("train", "expected key=value, got 'train'"),
        ("num_steps=1,2", "gives several values, and a run takes one"),
        ("rollout.servers=a=b", "quote a text for hydra and the shell, 'rollout.servers=\"a=b\"'"),
        ("num_steps=" + "9" * 5000, "cannot be read (Exceeds the limit (4300 digits)"),
        ("optimizer.lr=" + "9" * 400, "int too large to convert to float"),
        ("seed=${seed}", "seed: Recursive interpolation detected"),
        ("run_dir=${oc.env:MISSING}", "run_dir: KeyError raised while resolving interpolation"),
    ],
)
def test_an_odd_command_line_is_one_sentence(monkeypatch, override, words):
    monkeypatch.delenv("MISSING", raising=False)
    assert words in message_of(override)


def test_the_last_value_holds_and_an_entry_and_a_file_can_be_removed():
    config = load(["steps=3", "num_steps=4", "model={num_layers: 5}", "model=qwen3_8b", "model=tiny"])
    assert (config.num_steps, config.model.num_layers, config.model.hidden_size) == (4, 5, 64)
    removed = load(["model.transformer.a=1", "model.transformer.b=2", "~model.transformer.a"])
    assert removed.model.transformer == {"b": 2}
    chosen, removed = load([], "quickstart"), load(["~model"], "quickstart")
    assert (chosen.model.normalization, removed.model.normalization) == ("LayerNorm", "RMSNorm")


def test_every_short_name_sets_its_key_and_is_no_key_itself():
    config = load(["tp=2", "pp=4", "cp=8", "ep=16", "lr=1e-5", "batch=64", "steps=7", "logger=wandb"])
    p = config.parallel
    assert (p.tensor_model_parallel_size, p.pipeline_model_parallel_size, p.context_parallel_size) == (2, 4, 8)
    assert (p.expert_model_parallel_size, config.optimizer.lr, config.data.global_batch_size) == (16, 1e-5, 64)
    assert config.num_steps == 7 and config.metrics.loggers == ["wandb"] and len(SHORT) == 8
    assert set(SHORT.values()) <= keys().keys() and not SHORT.keys() & (keys().keys() | groups().keys())
