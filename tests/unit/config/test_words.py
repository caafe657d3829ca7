# Copyright (c) 2026 the megatron_selfdistill authors. Apache-2.0.
"""Short names of keys, and the words of other programs, lead to the key."""

from __future__ import annotations

import re

import pytest

from megatron_selfdistill.config import load
from megatron_selfdistill.config.key_list import groups, keys, unknown_key
from megatron_selfdistill.config.words import SHORT, WORDS
from megatron_selfdistill.errors import ConfigError


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
        ("learning-rate=1", "learning-rate is called optimizer.lr here"),
        ("num-gpus=8", "did you mean 'cluster.num_gpus'?"),
        ("nproc_per_node=8", "nproc_per_node is called cluster.num_gpus here: --ranks N starts N ranks"),
        (
            "trainer.total_epochs=3",
            "trainer.total_epochs is called num_steps here: steps = epochs x problems / data.global_batch_size",
        ),
        ("model=Qwen/Qwen3-1.7B", "did you mean checkpoint.load=Qwen/Qwen3-1.7B?"),
        ("data=problems.jsonl", "did you mean data.path=problems.jsonl?"),
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
