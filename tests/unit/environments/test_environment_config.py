# Copyright (c) 2026 the megatron_selfdistill authors. Apache-2.0.
"""The section ``environment``: what it refuses, and which of its keys a checkpoint binds."""

from __future__ import annotations

import contextlib

import pytest
from omegaconf import OmegaConf

from megatron_selfdistill.config import Config, from_mapping
from megatron_selfdistill.config.schema.data_config import judges_responses
from megatron_selfdistill.environments import configured_episodes
from megatron_selfdistill.errors import ConfigError

OWN = "environment.name=replying.Replying"
SERVERS = ["rollout.engine=vllm", "rollout.placement=server"]
TURNS, SAMPLES = "environment.max_turns=2", "rollout.num_samples=2"


def configured(*overrides: str) -> Config:
    return from_mapping(OmegaConf.from_dotlist(list(overrides)))


@pytest.mark.parametrize(
    ("overrides", "word"),
    [
        ([TURNS], "environment.name is none"),
        ([OWN, "environment.options.api_key=s3cr3t"], "environment.options.api_key_env"),
        ([*SERVERS, "rollout.servers=[https://node7, http://me@node8]"], "got 'http://***@"),
        ([OWN, "method.name=sft"], "method.name=sft"),
        ([OWN, "rollout.guidance=mixed"], "rollout.guidance=mixed"),
        ([OWN, TURNS, SAMPLES, "method.name=sdpo"], "environment.max_turns=1"),
        ([OWN, SAMPLES, "environment.limits.one_sequence=true", "method.name=sdpo"], "limits.one_sequence=false"),
    ],
)
def test_an_environment_that_cannot_work_is_one_message(overrides, word):
    with pytest.raises(ConfigError) as caught:
        configured(*overrides)
    assert word in str(caught.value) and "\n" not in str(caught.value) and "s3cr3t" not in str(caught.value)


def test_what_is_possible_with_one_turn_is_not_refused():
    for overrides in ([], [SAMPLES, "method.name=sdpo"], [SAMPLES, "method.name=uni_opd"]):
        assert judges_responses(configured(OWN, *overrides)), "the environment gives the rewards"


def refusals_of(overrides: list[str]) -> list[str]:
    """Return the messages with which runs refuse their environments, where they make them."""
    found = []
    for override in overrides:
        with pytest.raises(ConfigError) as caught:
            configured_episodes.training_player(configured(OWN, override), None, None, None)
        found.append(str(caught.value))
    return found


def test_a_class_that_is_missing_or_cannot_be_made_is_one_message_that_names_the_key(ranks):
    cases = {
        "environment.name=no_such_module.Counter": "no_such_module",
        "environment.name=replying.NOT_CALLABLE": "which is a str",
        "environment.options={api_key_env: LAB_UNSET}": "options.api_key_env: LAB_UNSET",
        "environment.options={rol: tool}": "environment.name=replying.Replying failed with TypeError: ",
    }
    [messages] = ranks.run(refusals_of, list(cases), world_size=1)
    assert all(word in message for word, message in zip(cases.values(), messages, strict=True))


@pytest.mark.parametrize(
    ("overrides", "found"), [([], "none and 1"), ([OWN], "replying.Replying and 1"), ([OWN, TURNS], None)]
)
def test_the_recipe_for_turns_needs_an_environment_of_several_turns(overrides, found):
    config = configured("method.name=sod", SAMPLES, *overrides)
    refused = pytest.raises(ConfigError, match=f"max_turns, got {found}$") if found else contextlib.nullcontext()
    with refused:
        config.method.require_start(config)
