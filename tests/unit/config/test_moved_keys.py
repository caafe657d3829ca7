# Copyright (c) 2026 the megatron_selfdistill authors. Apache-2.0.
"""Other names of keys: short names, words of other programs, and the keys of version 0.2, whose runs resume."""

from __future__ import annotations

import copy
import functools
import json
import re
from pathlib import Path
from typing import Any

import pytest
from tiers import combinations

from megatron_selfdistill.config import load
from megatron_selfdistill.config.bound_keys import BOUND, FREE, differences, stored_values
from megatron_selfdistill.config.key_list import groups, keys, unknown_key
from megatron_selfdistill.config.moved_keys import SHORT, WORDS, moved_key, translated
from megatron_selfdistill.errors import ConfigError
from megatron_selfdistill.train import EXIT_BAD_INPUT, main

STORED = json.loads((Path(__file__).parent / "stored_0_2.json").read_text(encoding="utf-8"))
"""What version 0.2.0 has stored for a run with the defaults."""

OTHER_VALUES = {
    "rollout.wave_microbatches": (3, "rollout.partial_batch_microbatches=3"),
    "model.yarn_rotary_scaling_factor": (4.0, "model.yarn.rotary_scaling_factor=4"),
    "model.yarn_original_max_position_embeddings": (64, "model.yarn.original_max_position_embeddings=64"),
    "model.yarn_beta_fast": (2.0, "model.yarn.beta_fast=2"),
    "model.yarn_beta_slow": (0.5, "model.yarn.beta_slow=0.5"),
    "model.yarn_mscale": (0.7, "model.yarn.mscale=0.7"),
    "model.yarn_mscale_all_dim": (0.7, "model.yarn.mscale_all_dim=0.7"),
    "model.yarn_correction_range_round_to_int": (False, "model.yarn.correction_range_round_to_int=false"),
    "model.moe_aux_loss_coeff": (0.1, "model.transformer.moe_aux_loss_coeff=0.1"),
    "model.moe_z_loss_coeff": (0.1, "model.transformer.moe_z_loss_coeff=0.1"),
    "model.rope_scaling": (True, "model.rope_scaling_factor=8"),
    "metrics.console": (False, "metrics.console_every=0"),
    "optimizer.adam_beta1": (0.8, "optimizer.constants.adam_beta1=0.8"),
    "optimizer.adam_beta2": (0.99, "optimizer.constants.adam_beta2=0.99"),
    "optimizer.adam_eps": (1e-4, "optimizer.constants.adam_eps=1e-4"),
    "optimizer.sgd_momentum": (0.9, "optimizer.constants.sgd_momentum=0.9"),
    "schedule.recompute_granularity": ("full", "schedule.recompute.granularity=full"),
    "schedule.recompute_method": ("block", "schedule.recompute.method=block"),
    "schedule.recompute_num_layers": (2, "schedule.recompute.num_layers=2"),
    "schedule.recompute_modules": (["mlp"], "schedule.recompute.modules=[mlp]"),
    "optimizer.lr_decay_steps": (7, "optimizer.lr_decay.steps=7"),
    "optimizer.lr_decay_style": ("cosine", "optimizer.lr_decay.style=cosine"),
    "guards.identity_tolerance": (1e-3, "guards.start.identity_tolerance=1e-3"),
    "guards.max_teacher_cross_entropy": (5.0, "guards.start.max_teacher_cross_entropy=5"),
    "guards.min_entropy_ratio": (None, "guards.entropy.min_ratio=null"),
    "guards.max_entropy_ratio": (4.0, "guards.entropy.max_ratio=4"),
    "guards.min_entropy_rise": (0.2, "guards.entropy.min_rise=0.2"),
}
"""Key of 0.2 -> another value than its default, and what sets the value now."""


@functools.cache
def loaded(*arguments: str) -> dict[str, Any]:
    """Return the values that a run with these arguments stores; hydra takes a tenth of a second for them.

    metrics.leak_words has the default of 0.2, since the present one is another.
    """
    words = ",".join(STORED["metrics"]["leak_words"])
    return stored_values(load(["run_dir=x", f"metrics.leak_words=[{words}]", *arguments]))


def stored(key: str = "seed", value: Any = 0) -> dict[str, Any]:
    """Return the configuration of a run of version 0.2 in which ``key`` has this value."""
    values = copy.deepcopy(STORED)
    section, _, name = key.rpartition(".")
    (values[section] if section else values)[name] = value
    return values


def test_a_run_that_version_0_2_has_begun_has_no_difference_from_the_present_defaults():
    old = stored()
    before = copy.deepcopy(old)
    assert differences(old, loaded()) == [] and old == before, "the stored values stay as they are"
    assert translated(loaded()) == loaded()


@pytest.mark.parametrize("key", OTHER_VALUES)
def test_a_stored_value_of_a_key_of_0_2_is_the_value_of_the_new_key(key):
    value, argument = OTHER_VALUES[key]
    old = stored(key, value)
    assert differences(old, loaded(argument)) == []
    (found,) = differences(old, loaded())
    expected = BOUND if key.startswith("model.") else FREE
    assert (found.key, found.rule) == (argument.partition("=")[0], expected)


def test_the_present_version_has_every_other_key_of_0_2():
    present, missing = loaded(), set()
    for section, values in STORED.items():
        names = values if isinstance(values, dict) and section != "from_environment" else ()
        missing |= {f"{section}.{name}" for name in names if name not in present[section]}
    assert missing == {*OTHER_VALUES, "model.allow_untested_fp8"}
    assert "is now model.transformer.fp8, which alone" in str(moved_key("model.allow_untested_fp8"))


def test_a_run_of_version_0_1_is_refused():
    with pytest.raises(ConfigError, match=r"^version 0\.1 has written this checkpoint, .* checkpoint\.load in another"):
        differences({name: values for name, values in STORED.items() if name != "method"}, loaded())


@pytest.mark.parametrize("key", OTHER_VALUES)
def test_an_old_key_is_one_sentence_that_names_the_new_one(key):
    new = OTHER_VALUES[key][1].partition("=")[0]
    assert unknown_key(key) == moved_key(key)
    assert re.match(re.escape(f"{key} is now {new}") + "(,|$)", str(moved_key(key)))


@combinations(key=list(OTHER_VALUES), quick={"key": ["model.yarn_mscale", "metrics.console"]}, strength=1)
def test_an_old_key_on_the_command_line_and_in_a_file_is_that_sentence(key, tmp_path, capsys):
    with pytest.raises(ConfigError, match=f"^{re.escape(str(moved_key(key)))}$"):
        load([f"{key}=1"])
    section, _, name = key.partition(".")
    (tmp_path / "recipe").mkdir()
    (tmp_path / "recipe" / "old.yaml").write_text(f"# @package _global_\n{section}: {{{name}: null}}\n")
    assert main(["run_dir=x", "--config-dir", str(tmp_path), "recipe=old"]) == EXIT_BAD_INPUT
    (line,) = capsys.readouterr().err.splitlines()
    assert line.endswith(str(moved_key(key))) and "recipe/old" in line


def test_other_keys_have_not_moved():
    assert moved_key("method.weight") is moved_key("rollout.num_samples") is moved_key("environment.name") is None


@pytest.mark.parametrize("word", WORDS)
def test_the_word_of_another_program_names_a_key_that_exists(word):
    key, _, advice = WORDS[word].partition(": ")
    assert unknown_key(key) is None and unknown_key(key.rpartition(".")[0] or key) is None
    assert all(unknown_key(one) is None for one in re.findall(r"[a-z_]+\.[a-z_.]+[a-z]", advice))
    assert word not in keys(), "a key needs no other word"
    if word not in groups():
        for spelt in (word, f"trainer.{word}"):
            assert str(unknown_key(spelt)).startswith(f"{spelt} is called {key} here")


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("learning_rate=1", "learning_rate is called optimizer.lr here"),
        (
            "trainer.total_epochs=3",
            "trainer.total_epochs is called num_steps here: steps = epochs x problems / data.global_batch_size",
        ),
        ("model=Qwen/Qwen3-1.7B", "did you mean checkpoint.load=Qwen/Qwen3-1.7B?"),
        ("data=problems.jsonl", "or data.path=problems.jsonl?"),
        ("actor.optim.lr=1", "did you mean 'optimizer.lr'?"),
    ],
)
def test_a_word_of_another_program_on_the_command_line_leads_to_the_key(override, message):
    with pytest.raises(ConfigError, match=re.escape(message)):
        load([override])


def test_every_short_name_sets_its_key_and_is_no_key_itself():
    config = load(["tp=2", "pp=4", "cp=8", "ep=16", "lr=1e-5", "batch=64", "steps=7"])
    p = config.parallel
    assert (p.tensor_model_parallel_size, p.pipeline_model_parallel_size, p.context_parallel_size) == (2, 4, 8)
    assert (p.expert_model_parallel_size, config.optimizer.lr, config.data.global_batch_size) == (16, 1e-5, 64)
    assert config.num_steps == 7 and len(SHORT) == 7
    assert set(SHORT.values()) <= keys().keys() and not SHORT.keys() & (keys().keys() | groups().keys() | WORDS.keys())


def test_two_names_of_one_key_are_refused_and_the_last_of_equal_names_holds():
    with pytest.raises(ConfigError, match=r"^tp and parallel\.tensor_model_parallel_size are two names of one key"):
        load(["tp=2", "parallel.tensor_model_parallel_size=4"])
    assert load(["steps=2", "steps=3"]).num_steps == 3


def test_a_file_has_the_whole_name_of_a_key(tmp_path):
    (tmp_path / "recipe").mkdir()
    (tmp_path / "recipe" / "ours.yaml").write_text("# @package _global_\nlr: 1\n")
    with pytest.raises(ConfigError, match=r"lr is short for optimizer\.lr on a command line"):
        load(["recipe=ours"], search_path=[str(tmp_path)])
