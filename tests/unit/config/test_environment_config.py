# Copyright (c) 2026 the megatron_selfdistill authors. Apache-2.0.
"""The section ``environment``: what it refuses, and which of its keys a checkpoint binds."""

from __future__ import annotations

import subprocess
import sys

import pytest
from omegaconf import OmegaConf

from megatron_selfdistill.config import Config, from_mapping
from megatron_selfdistill.config.bound_keys import BOUND, FREE, rule_of
from megatron_selfdistill.errors import ConfigError
from megatron_selfdistill.sources import configured_source

OWN = "environment.name=replying.Replying"
HTTP = ["environment.name=http", "environment.options.url=http://host:8000/v1"]
RLTF = ["method.name=rltf", "rollout.num_samples=2"]
SERVERS = ["rollout.engine=vllm", "rollout.placement=server"]
TURNS, SAMPLES = "environment.max_turns=2", "rollout.num_samples=2"


def configured(*overrides: str) -> Config:
    return from_mapping(OmegaConf.from_dotlist(list(overrides)))


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        ([TURNS], "environment.max_turns is a setting of an environment, but environment.name is none"),
        (["environment.options={a: 1}"], "environment.options is a setting of an environment"),
        (
            ["environment.name=Checker"],
            "environment.name must be one of none, http, http_sessions, tools, a dotted path (package.module.function)",
        ),
        (["environment.name=http"], "environment.name=http needs environment.options.url, such as http://host:8000/v1"),
        ([*HTTP, "environment.options.api_key=s3cr3t"], "name the variable with environment.options.api_key_env"),
        (
            [*SERVERS, "rollout.servers=[https://node7, http://me@node8]"],
            "rollout.servers must be an address without a user and a password",
        ),
        (
            [OWN, "environment.limits={second: 1}"],
            "a key of environment.limits must be one of tokens, one_sequence, seconds, memory_gb",
        ),
        ([OWN, "environment.limits.seconds=0"], "environment.limits.seconds must be above 0, got 0"),
        (["environment.limits={tokens: 9}"], "environment.limits is a setting of an environment"),
        (["environment.name=http_sessions"], "environment.name=http_sessions needs environment.options.url, such as"),
        ([OWN, "environment.max_turns=0"], "environment.max_turns must be at least 1, got 0"),
        (["method.name=grpo", SAMPLES, "method.credit=response"], "method.credit must be one of episode, turn"),
        (
            ["method.name=grpo", SAMPLES, "method.credit=turn", "method.discount=2"],
            "method.discount must be at most 1, got 2",
        ),
        (
            ["method.name=grpo", SAMPLES, "method.discount=0.5"],
            "method.credit=episode adds all rewards of an episode: set method.credit=turn",
        ),
        ([*RLTF, "method.revision_baseline=last"], "method.revision_baseline must be one of first_turn, same_turn"),
        ([*RLTF, "method.reply_template='{problem}'"], "the slots {problem}, {response} and no others, got {problem}"),
        ([*RLTF, OWN, "method.revision_weight=0.1"], "got replying.Replying and 1"),
        ([*RLTF, "method.reply_weight=0.1"], "environment.max_turns of at least 2, got none and 1"),
        ([OWN, "method.name=sft"], "a method that samples, got problems and method.name=sft"),
        ([OWN, "data.kind=conversations"], "it needs data.kind=problems"),
        ([OWN, "rollout.guidance=mixed"], "with rollout.guidance=mixed is not possible"),
        ([OWN, TURNS, SAMPLES, "method.name=sdpo"], "method.hints=peer compares responses to one prompt"),
        ([OWN, TURNS, SAMPLES, "method.name=uni_opd"], "method.name=uni_opd compares responses to one prompt"),
        ([OWN, TURNS, SAMPLES, "method.name=caopd"], "method.name=caopd compares responses to one prompt"),
        (
            [OWN, SAMPLES, "environment.limits.one_sequence=true", "method.name=sdpo"],
            "method.name=sdpo gives each turn a hint of its own later: set environment.limits.one_sequence=false",
        ),
        ([OWN, "environment.limits.one_sequence=1"], "environment.limits.one_sequence must be true or false, got 1"),
        ([OWN, TURNS, "method.select=a.b"], "method.select compares responses to one prompt"),
        (
            [OWN, TURNS, SAMPLES, "method.name=scope"],
            "method.name=scope compares responses to one prompt, but with environment.max_turns=2",
        ),
    ],
)
def test_an_environment_that_cannot_work_is_one_message(overrides, message):
    with pytest.raises(ConfigError) as caught:
        configured(*overrides)
    assert message in str(caught.value) and "\n" not in str(caught.value) and "s3cr3t" not in str(caught.value)


def test_what_is_possible_with_one_turn_is_not_refused():
    for overrides in ([], [SAMPLES, "method.name=sdpo"], [SAMPLES, "method.name=uni_opd"]):
        assert configured(OWN, *overrides).judges_responses, "the environment gives the rewards"


def refusal_of(overrides: list[str]) -> str:
    """Return the message with which a run refuses its environment, where the run makes it."""
    with pytest.raises(ConfigError) as caught:
        configured_source._episodes(configured(*overrides), None, grid=None)
    return str(caught.value)


def test_a_class_that_is_missing_or_cannot_be_made_is_one_message_that_names_the_key(ranks):
    cases = {
        "environment.name=no_such_module.Counter": "no_such_module cannot be imported",
        "environment.name=replying.NOT_CALLABLE": "which is a str",
        "environment.options={rol: tool}": "environment.name=replying.Replying failed with TypeError: ",
    }
    for override, words in cases.items():
        [message] = ranks.run(refusal_of, [OWN, override], world_size=1)
        assert words in message


@pytest.mark.parametrize(
    ("overrides", "found"),
    [([], "none and 1"), ([OWN], "replying.Replying and 1"), ([OWN, TURNS], None)],
)
def test_the_recipe_for_turns_needs_an_environment_of_several_turns(overrides, found):
    config = configured("method.name=sod", SAMPLES, *overrides)
    if found is None:
        return config.method.require_start(config)
    with pytest.raises(ConfigError, match=f"needs an environment .* and at least 2 for .*max_turns, got {found}$"):
        config.method.require_start(config)


def test_what_decides_the_replies_is_bound_and_the_way_to_the_endpoint_is_free():
    for name in ("name", "options.role", "max_turns", "options.model"):
        assert rule_of(f"environment.{name}") == BOUND
    for name in ("url", "api_key_env", "timeout_s", "retries", "concurrency"):
        assert rule_of(f"environment.options.{name}") == FREE


def test_a_refusal_imports_no_torch():
    code = (
        "import sys; from megatron_selfdistill.train import main\n"
        f"status = main(['run_dir=x', 'data.path=x', 'data.tokenizer=x', {TURNS!r}])\n"
        "assert status == 2 and 'torch' not in sys.modules"
    )
    assert subprocess.run([sys.executable, "-c", code], capture_output=True).returncode == 0
