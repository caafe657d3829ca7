# Copyright (c) 2026 the megatron_selfdistill authors. Apache-2.0.
"""The section ``environment``: what it refuses, and which of its keys a checkpoint binds."""

from __future__ import annotations

import subprocess
import sys

import pytest
from omegaconf import OmegaConf

from megatron_selfdistill import prechecks
from megatron_selfdistill.config import Config, from_mapping
from megatron_selfdistill.config.bound_keys import BOUND, FREE, differences, rule_of, stored_values
from megatron_selfdistill.errors import ConfigError

OWN = "environment.name=replying.Replying"
HTTP = ["environment.name=http", "environment.url=http://host:8000/v1"]
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
            "environment.name must be one of none, http, a dotted path (package.module.function), got",
        ),
        (["environment.name=http"], "environment.url must be an address such as http://host:8000/v1"),
        (["environment.name=http", "environment.url=host:8000"], "such as http://host:8000/v1, got 'host:8000'"),
        (["environment.name=http", "environment.url=http://[::1"], "such as http://host:8000/v1, got 'http://[::1'"),
        (["environment.name=http", "environment.url=http://host:99999"], "got 'http://host:99999'"),
        (
            ["environment.name=http", "environment.url=http://host/v1?a=b"],
            "http://host:8000/v1, got 'http://host/v1?***'",
        ),
        (["environment.name=http", "environment.url=https:///v1"], "got 'https:///v1'"),
        (["environment.name=http", "environment.url=me:s3cr3t@host/v1"], "got '***@host/v1'"),
        (["environment.name=http", "environment.url=http://host/v1?key=s3cr3t"], "got 'http://host/v1?***'"),
        (
            ["environment.name=http", "environment.url=https://me:s3cr3t@host/v1"],
            "environment.url must be an address without a user and a password, since no request would send them and "
            "the files of the run would show them, got 'https://***@host/v1': remove the part before the host",
        ),
        (
            [*SERVERS, "rollout.servers=[https://node7, http://me@node8]"],
            "rollout.servers must be an address without a user and a password",
        ),
        ([OWN, "environment.url=http://host:8000"], "and null otherwise, got 'http://host:8000'"),
        ([*HTTP, "environment.options={role: tool}"], "environment.name=http names none: unset environment.options"),
        ([OWN, "environment.max_turns=0"], "environment.max_turns must be at least 1, got 0"),
        ([*HTTP, "environment.timeout_s=0"], "environment.timeout_s must be above 0, got 0"),
        ([*HTTP, "environment.retries=-1"], "environment.retries must be at least 0, got -1"),
        ([*HTTP, "environment.concurrency=0"], "environment.concurrency must be at least 1, got 0"),
        (["policy.credit=response"], "policy.credit must be one of episode, turn"),
        (["policy.credit=turn", "policy.discount=2"], "policy.discount must be at most 1, got 2"),
        (["policy.discount=0.5"], "policy.credit=episode adds all rewards of an episode: set policy.credit=turn"),
        (["policy.revision_baseline=last_turn"], "policy.revision_baseline must be one of first_turn, same_turn"),
        (["policy.reply_template='{problem}'"], "the slots {problem} and {response} and no other, got ['problem']"),
        ([OWN, SAMPLES, "policy.weight=1", "policy.revision_weight=0.1"], "got replying.Replying, 1 and 1"),
        ([OWN, TURNS, "policy.reply_weight=0.1"], "policy.reply_weight trains on texts of episodes of several turns"),
        (["policy.revision_weight=0.1"], "policy.weight above 0, got none, 1 and 0"),
        ([OWN, "objective=sft"], "another objective than sft, got problems and sft"),
        ([OWN, "data.kind=conversations"], "it needs data.kind=problems"),
        ([OWN, "rollout.guidance=mixed"], "with rollout.guidance=mixed is not possible"),
        ([OWN, TURNS, SAMPLES, "data.solutions=peer"], "data.solutions=peer compares responses to one prompt"),
        ([OWN, TURNS, SAMPLES, "rollout.select=balance"], "rollout.select=balance compares responses to one prompt"),
        (
            [OWN, TURNS, SAMPLES, "distill.rule=scope", "distill.signal=sampled"],
            "set distill.rule=uniform or environment.max_turns=1",
        ),
    ],
)
def test_an_environment_that_cannot_work_is_one_message(overrides, message):
    with pytest.raises(ConfigError) as caught:
        configured(*overrides)
    assert message in str(caught.value) and "\n" not in str(caught.value) and "s3cr3t" not in str(caught.value)


def test_what_is_possible_with_one_turn_is_not_refused():
    for overrides in ([], [SAMPLES, "data.solutions=peer"], [SAMPLES, "rollout.select=balance"]):
        assert configured(OWN, *overrides).judges_responses, "the environment gives the rewards"


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (["environment.name=no_such_module.Counter"], "no_such_module cannot be imported"),
        (["environment.name=replying.NOT_CALLABLE"], "which is a str"),
        (
            [OWN, "environment.options={rol: tool}"],
            r"must be the keyword arguments of replying.Replying, got \['rol'\]: got an unexpected .* 'rol'",
        ),
    ],
)
def test_a_class_that_is_missing_or_takes_other_arguments_is_refused_before_the_start(overrides, message):
    with pytest.raises(ConfigError, match=message):
        prechecks.require_environment(configured(*overrides))


@pytest.mark.parametrize(
    ("overrides", "found"),
    [([], "none and 1"), ([OWN], "replying.Replying and 1"), ([OWN, TURNS], None)],
)
def test_the_recipe_for_turns_needs_an_environment_of_several_turns(overrides, found):
    config = configured("distill.rule=sod", "distill.signal=advantage", *overrides)
    if found is None:
        return prechecks.require_environment(config)
    with pytest.raises(ConfigError, match=f"needs an environment .* and at least 2 for .*max_turns, got {found}$"):
        prechecks.require_environment(config)


def test_a_class_that_takes_the_options_passes_without_being_made(monkeypatch):
    def make(self, role: str) -> None:
        raise AssertionError("a check before the start makes no environment")

    monkeypatch.setattr("replying.Replying.__init__", make)
    prechecks.require_environment(configured(OWN, "environment.options={role: tool}"))
    prechecks.require_environment(configured(*HTTP))
    prechecks.require_environment(configured())


def test_what_decides_the_replies_is_bound_and_the_way_to_the_endpoint_is_free():
    for name in ("name", "options.role", "max_turns", "model"):
        assert rule_of(f"environment.{name}") == BOUND
    for name in ("url", "api_key", "timeout_s", "retries", "concurrency"):
        assert rule_of(f"environment.{name}") == FREE


def test_digests_of_values_from_the_environment_stand_beside_the_section_environment(monkeypatch):
    def stored(value: str, *overrides: str) -> dict:
        monkeypatch.setenv("SOME_WORDING", value)
        return stored_values(configured("data.system_prompt=${oc.env:SOME_WORDING}", *overrides))

    before = stored("a")
    assert [one.key for one in differences(before, stored("b", OWN))] == ["environment.name", "data.system_prompt"]
    before["environment"] = before.pop("from_environment")  # as checkpoints were before the section existed
    assert [one.key for one in differences(before, stored("b"))] == ["data.system_prompt"]
    assert not differences(before, stored("a"))


def test_a_refusal_imports_no_torch():
    code = (
        "import sys; from megatron_selfdistill.train import main\n"
        f"status = main(['run_dir=x', 'data.path=x', 'data.tokenizer=x', {TURNS!r}])\n"
        "assert status == 2 and 'torch' not in sys.modules"
    )
    assert subprocess.run([sys.executable, "-c", code], capture_output=True).returncode == 0
