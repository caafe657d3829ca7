# Copyright (c) 2026 the megatron_selfdistill authors. Apache-2.0.
"""The section ``environment``: what it refuses, and which of its keys a checkpoint binds."""

from __future__ import annotations

import subprocess
import sys

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
    ("overrides", "message"),
    [
        ([TURNS], "the section environment has settings, but environment.name is none"),
        ([OWN, "environment.options.api_key=s3cr3t"], "name the variable with environment.options.api_key_env"),
        (
            [*SERVERS, "rollout.servers=[https://node7, http://me@node8]"],
            "without a user and a password, which the files of the run would show, and without ? and #, got 'http://***@",
        ),
        ([OWN, "method.name=sft"], "it needs a method that samples and data.kind=problems, got method.name=sft"),
        ([OWN, "rollout.guidance=mixed"], "rollout.guidance=mixed samples from prompts and hints"),
        ([OWN, TURNS, SAMPLES, "method.name=sdpo"], "method.name=sdpo needs environment.max_turns=1, got"),
        (
            [OWN, SAMPLES, "environment.limits.one_sequence=true", "method.name=sdpo"],
            "method.name=sdpo gives each turn a hint of its own later: set environment.limits.one_sequence=false",
        ),
    ],
)
def test_an_environment_that_cannot_work_is_one_message(overrides, message):
    with pytest.raises(ConfigError) as caught:
        configured(*overrides)
    assert message in str(caught.value) and "\n" not in str(caught.value) and "s3cr3t" not in str(caught.value)


def test_what_is_possible_with_one_turn_is_not_refused():
    for overrides in ([], [SAMPLES, "method.name=sdpo"], [SAMPLES, "method.name=uni_opd"]):
        assert judges_responses(configured(OWN, *overrides)), "the environment gives the rewards"


def refusal_of(overrides: list[str]) -> str:
    """Return the message with which a run refuses its environment, where the run makes it."""
    with pytest.raises(ConfigError) as caught:
        configured_episodes.training_player(configured(*overrides), None, None, None)
    return str(caught.value)


def test_a_class_that_is_missing_or_cannot_be_made_is_one_message_that_names_the_key(ranks):
    cases = {
        "environment.name=no_such_module.Counter": "no_such_module cannot be imported",
        "environment.name=replying.NOT_CALLABLE": "which is a str",
        "environment.options={api_key_env: LAB_UNSET}": "options.api_key_env: LAB_UNSET is not set: export it",
        "environment.options={rol: tool}": "environment.name=replying.Replying failed with TypeError: ",
    }
    for override, words in cases.items():
        [message] = ranks.run(refusal_of, [OWN, override], world_size=1)
        assert words in message


@pytest.mark.parametrize(
    ("overrides", "found"), [([], "none and 1"), ([OWN], "replying.Replying and 1"), ([OWN, TURNS], None)]
)
def test_the_recipe_for_turns_needs_an_environment_of_several_turns(overrides, found):
    config = configured("method.name=sod", SAMPLES, *overrides)
    if found is None:
        return config.method.require_start(config)
    with pytest.raises(ConfigError, match=f"needs an environment .* and at least 2 for .*max_turns, got {found}$"):
        config.method.require_start(config)


def test_a_refusal_imports_no_torch():
    code = (
        "import sys; from megatron_selfdistill.train import main\n"
        f"status = main(['run_dir=x', 'data.path=x', 'data.tokenizer=x', {TURNS!r}])\n"
        "assert status == 2 and 'torch' not in sys.modules"
    )
    assert subprocess.run([sys.executable, "-c", code], capture_output=True).returncode == 0
