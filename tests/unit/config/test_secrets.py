# Copyright (c) 2026 the megatron_selfdistill authors. Apache-2.0.
"""A run uses the values of ``${oc.env:NAME}`` and secrets as text, and neither writes nor prints them."""

from __future__ import annotations

import dataclasses
import json
import os
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import tiny_run
from omegaconf import OmegaConf
from reported_runs import blocks_of

from megatron_selfdistill import train
from megatron_selfdistill.config import from_mapping, load, shown_argument, to_yaml, writable
from megatron_selfdistill.config.bound_keys import FREE, READ_VALUES, differences, refusal, stored_values
from megatron_selfdistill.errors import ConfigError
from megatron_selfdistill.instruments.plan.plan_tables import launch_commands
from megatron_selfdistill.sources.given_responses import list_skipped
from megatron_selfdistill.terminal import SHORTEST_HIDDEN, hidden
from megatron_selfdistill.train import main

SECRET = "s3cr3t-0f-the-lab"

READ = {
    "alone": ("data.path='${oc.env:LAB_SECRET}'", "data.path", SECRET),
    "inside a text": ("data.path='/a/${oc.env:LAB_SECRET}/b'", "data.path", f"/a/{SECRET}/b"),
    "in a free-form dictionary": (
        "rollout.engine_args={hf_token: '${oc.env:LAB_SECRET}'}",
        "rollout.engine_args.hf_token",
        SECRET,
    ),
    "below a key with a dot": (
        "data.chat_template_kwargs={a.b: '${oc.env:LAB_SECRET}'}",
        "data.chat_template_kwargs",
        {"a.b": SECRET},
    ),
    "in a list": (
        "rollout.servers=['http://${oc.env:LAB_SECRET}:80']",
        "rollout.servers[0]",
        f"http://{SECRET}:80",
    ),
    "a whole dictionary": (
        "data.chat_template_kwargs='${oc.decode:${oc.env:LAB_DICTIONARY}}'",
        "data.chat_template_kwargs",
        {"key": SECRET},
    ),
    "with a default that is not used": ("data.path='${oc.env:LAB_SECRET,none}'", "data.path", SECRET),
    "the default": ("data.path='${oc.env:LAB_UNSET,/default}'", "data.path", "/default"),
    "a number": ("num_steps='${oc.env:LAB_NUMBER}'", "num_steps", 77),
}


@pytest.fixture(autouse=True)
def environment(monkeypatch):
    monkeypatch.setenv("LAB_SECRET", SECRET)
    monkeypatch.setenv("LAB_DICTIONARY", f"{{key: {SECRET}}}")
    monkeypatch.setenv("LAB_NUMBER", "77")
    monkeypatch.delenv("LAB_UNSET", raising=False)


def servers(override: str) -> list[str]:
    return [override, *(["rollout.engine=vllm", "rollout.placement=server"] if "servers" in override else [])]


@pytest.mark.parametrize("name", READ)
def test_a_value_from_the_environment_is_used_and_its_interpolation_is_written(name):
    override, key, value = READ[name]
    config = load(servers(override))
    plain = dataclasses.asdict(config)
    del plain["from_environment"]
    assert OmegaConf.select(OmegaConf.create(plain), key) == value
    text = to_yaml(config)
    assert SECRET not in text
    assert "${oc.env:LAB_" in text or "${oc.decode:${oc.env:LAB_" in text
    assert from_mapping(OmegaConf.create(text)) == config, "what is written reads the environment again"


def test_a_value_that_another_key_takes_over_is_not_written_either():
    config = load(["data.path='${oc.env:LAB_SECRET}'", "evaluation.path='${data.path}'"])
    assert config.evaluation.path == SECRET
    written = writable(config)
    assert (written["data"]["path"], written["evaluation"]["path"]) == ("${oc.env:LAB_SECRET}", "${data.path}")


def test_a_value_that_is_replaced_later_is_written_as_it_is():
    config = load(["run_dir='${oc.env:LAB_SECRET}'", "model.transformer={x: '${oc.env:LAB_SECRET}'}"])
    model = dataclasses.replace(config.model, transformer={})
    config = dataclasses.replace(config, run_dir="runs/other", model=model)
    assert writable(config)["run_dir"] == "runs/other"
    assert writable(config)["model"]["transformer"] == {}


def test_two_runs_with_other_values_of_one_variable_have_the_same_written_form(monkeypatch):
    written = []
    for value in ("/node1/scratch", "/node2/scratch"):
        monkeypatch.setenv("LAB_SECRET", value)
        written.append(writable(load(["data.path='${oc.env:LAB_SECRET}/x.jsonl'"])))
    assert written[0] == written[1]


@pytest.mark.parametrize(
    "overrides",
    [
        ["rollout.engine='${oc.env:LAB_SECRET}'"],
        ["num_steps='${oc.env:LAB_SECRET}'"],
        ["rollout.engine=vllm", "rollout.placement=server", "rollout.servers=['${oc.env:LAB_SECRET}']"],
    ],
)
def test_an_error_about_a_value_quotes_the_interpolation(overrides):
    with pytest.raises(ConfigError) as caught:
        load(overrides)
    assert SECRET not in str(caught.value) and "${oc.env:LAB_SECRET}" in str(caught.value)


def test_an_error_of_a_run_quotes_the_interpolation(data, tmp_path, capfd):
    options = ["data.path='/nowhere/${oc.env:LAB_SECRET}.jsonl'"]
    assert main(tiny_run.overrides(data, tmp_path / "run", *options)) == 2
    error = capfd.readouterr().err
    assert SECRET not in error and "/nowhere/${oc.env:LAB_SECRET}.jsonl" in error


def test_the_printed_configuration_has_the_interpolation(data, tmp_path, capsys):
    arguments = tiny_run.overrides(data, tmp_path / "run", "data.system_prompt='say ${oc.env:LAB_SECRET}'", "--print")
    assert main(arguments) == 0
    printed = capsys.readouterr().out
    assert SECRET not in printed and "say ${oc.env:LAB_SECRET}" in printed


def test_the_commands_of_a_plan_hold_the_interpolation_as_it_was_typed():
    keys = [
        "run_dir='/scratch/${oc.env:LAB_SECRET}/first'",
        "data.path='/data/${oc.env:LAB_SECRET}'",
        "rollout.hf_config='/models/${oc.env:LAB_SECRET}'",
    ]
    overrides = [*keys, "rollout.engine=vllm", "rollout.placement=server", "rollout.num_servers=1"]
    commands = launch_commands(load([*overrides, "cluster.num_gpus=16"]), overrides)
    for command in commands:
        assert SECRET not in command and "/scratch/${oc.env:LAB_SECRET}/first" in command


def test_the_list_of_what_was_skipped_hides_the_value(tmp_path):
    load(["data.path='${oc.env:LAB_SECRET}'"])
    for _ in range(2):
        list_skipped(tmp_path / "skipped.txt", [f"/data/{SECRET}/a.jsonl:3: too long"])
    assert (tmp_path / "skipped.txt").read_text() == "/data/${oc.env:LAB_SECRET}/a.jsonl:3: too long\n"


def test_short_values_stay_in_messages_and_escaped_ones_are_found(monkeypatch):
    monkeypatch.setenv("LAB_SHORT", "x" * (SHORTEST_HIDDEN - 1))
    monkeypatch.setenv("LAB_LINES", "one\ntwo 'three'")
    load(["data.path='${oc.env:LAB_SHORT}'", "data.system_prompt='${oc.env:LAB_LINES}'"])
    assert hidden("max") == "max" and hidden("x" * 5) == "x" * 5
    assert hidden(f"got {'one' + chr(10) + 'two'!r}") == "got 'one\\ntwo'"
    for shown in ("one\ntwo 'three'", "one\\ntwo 'three'"):
        assert hidden(f"<{shown}>") == "<${oc.env:LAB_LINES}>"


def test_a_directory_that_exists_stays_in_messages_so_that_commands_can_be_pasted(monkeypatch, tmp_path):
    monkeypatch.setenv("LAB_SCRATCH", str(tmp_path))
    config = load(["run_dir='${oc.env:LAB_SCRATCH}/first'"])
    assert hidden(f"convert {config.run_dir}") == f"convert {tmp_path}/first"
    assert writable(config)["run_dir"] == "${oc.env:LAB_SCRATCH}/first"


def test_a_complete_run_that_is_started_again_hides_its_directory(capsys):
    config = load(["run_dir='/scratch/${oc.env:LAB_SECRET}'"])
    checkpoint = Path(config.run_dir, "checkpoints", "iter_0000100")
    assert train._already_complete(config, checkpoint, SimpleNamespace(rank=0)) == 0
    output = capsys.readouterr().out
    assert SECRET not in output and "checkpoint: /scratch/${oc.env:LAB_SECRET}/checkpoints/iter_0000100" in output


def files_with(text: str, directory: Path) -> list[str]:
    """Return the files below ``directory`` whose name or bytes hold ``text``."""
    return [
        str(file.relative_to(directory))
        for file in directory.rglob("*")
        if text in str(file.relative_to(directory)) or (file.is_file() and text.encode() in file.read_bytes())
    ]


def train_with(environment: dict[str, str], arguments: list[str]) -> tuple[int, str]:
    os.environ.update(environment)
    return tiny_run.start_and_listen(arguments)


def test_a_run_writes_and_prints_no_value_from_the_environment(ranks, data, tmp_path):
    """The run directory, its checkpoints and the output hold no secret, although paths and wording do."""
    (tmp_path / SECRET).symlink_to(data)
    options = [
        "data.path='${oc.env:LAB_DATA}/problems.jsonl'",
        "data.tokenizer='${oc.env:LAB_DATA}/tokenizer'",
        "data.chat_template='${oc.env:LAB_CHAT}'",
        "evaluation.path='${data.path}'",
        "evaluation.at_start=true",
        "evaluation.limit=2",
        "rollout.engine_args={hf_token: '${oc.env:LAB_SECRET}'}",
        "metrics.console_every=1",
        "metrics.loggers=[tensorboard]",
        "report.every=1",
        "num_steps=1",
    ]
    run = tmp_path / "run"
    environment = {
        "LAB_SECRET": SECRET,
        "LAB_DATA": str(tmp_path / SECRET),
        "LAB_RUN": str(run),
        "LAB_CHAT": "{% for m in messages %}{{ m.content }}{% endfor %}{# " + SECRET + " #}",
    }
    arguments = tiny_run.overrides(data, run, *options, "run_dir='${oc.env:LAB_RUN}'")
    [(status, output)] = ranks.run(train_with, environment, arguments, world_size=1, init_process_group=False)
    assert status == 0, output
    assert SECRET not in output
    assert f"everything goes to {run}" in output  # a directory that exists, which the next command needs
    assert "run_dir: ${oc.env:LAB_RUN}" in (run / "config.yaml").read_text()
    assert (run / "checkpoints" / "iter_0000001").is_dir() and files_with("seconds/step", run)
    assert files_with(SECRET, run) == []
    shown = blocks_of((run / "report.html").read_text())
    assert len(shown["evaluations"][0]) == 4 and SECRET not in json.dumps(shown)
    assert "${oc.env:LAB_DATA}/problems.jsonl" in (run / "config.yaml").read_text()


TYPED = "sk-typed-0n-the-command-line"
OWN = "environment.name=replying.Replying"


@pytest.mark.parametrize(
    ("override", "shown"),
    [
        (f"environment.options.api_key={TYPED}", "${oc.env:ENVIRONMENT_OPTIONS_API_KEY}"),
        (f"environment.options.api_key='{TYPED}'", "${oc.env:ENVIRONMENT_OPTIONS_API_KEY}"),
        ("environment.options.api_key=s3cr7", "${oc.env:ENVIRONMENT_OPTIONS_API_KEY}"),
        (f"rollout.server_env={{HF_TOKEN: {TYPED}}}", "${oc.env:ROLLOUT_SERVER_ENV_HF_TOKEN}"),
        (f"+rollout.engine_args.hf_token={TYPED}", "${oc.env:ROLLOUT_ENGINE_ARGS_HF_TOKEN}"),
    ],
)
def test_a_secret_that_is_written_out_is_used_and_never_written(override, shown):
    config = load([override, "environment.name=http", "environment.options.url=http://host"])
    (found,) = config.from_environment.values()
    assert found.value in (TYPED, "s3cr7") and (found.value == "s3cr7" or TYPED not in hidden(f"401: {TYPED}"))
    if found.value == TYPED:
        assert TYPED not in hidden(repr(config)), "the free-form keys are in the representation of the configuration"
    assert found.value not in repr(config.environment) + to_yaml(config) + str(writable(config))
    assert f": {shown}\n" in to_yaml(config)
    assert "s3cr7" not in shown_argument(override) and shown in shown_argument(override)


def test_a_secret_to_which_another_key_refers_is_not_written_either():
    second = "+environment.options.password='${environment.options.api_key}'"
    config = load([f"environment.options.api_key={TYPED}", second, OWN])
    assert config.environment.options == {"api_key": TYPED, "password": TYPED} and TYPED not in to_yaml(config)


def test_what_is_no_secret_is_written_as_it_is():
    options = ["+environment.options={stop_token: end, keys: 3}", "+environment.options.api_key=null", OWN]
    assert not load(options).from_environment
    assert [*map(shown_argument, options)] == options
    assert (
        shown_argument("environment.options.api_key='${oc.env:LAB_SECRET}'")
        == "environment.options.api_key='${oc.env:LAB_SECRET}'"
    )


def bound(key: str) -> dict[str, Any]:
    return stored_values(load([OWN, f"+environment.options.password='{key}'"]))


def test_a_run_resumes_with_the_same_secret_and_not_with_another(monkeypatch):
    monkeypatch.setenv("LAB_SECRET", TYPED)
    now = bound(TYPED)
    assert TYPED not in json.dumps(now)
    old = json.loads(json.dumps(now).replace("${oc.env:ENVIRONMENT_OPTIONS_PASSWORD}", TYPED)) | {READ_VALUES: {}}
    for same in (now, old, bound("${oc.env:LAB_SECRET}")):
        assert differences(same, now) == differences(now, same) == []
    for other in (bound("sk-an0ther"), old | {"environment": old["environment"] | {"options": {"password": "sk-old"}}}):
        message = refusal(differences(other, now), "iter_1")
        assert message is not None and "environment.options.password" in message and "sk-" not in message


def test_a_free_secret_of_an_old_checkpoint_is_not_shown():
    http = ["environment.name=http", "environment.options.url=http://host"]
    now = stored_values(load([*http, "environment.options.api_key='${oc.env:LAB_SECRET}'"]))
    options = {"url": "http://host", "api_key": "sk-old"}
    old = now | {"environment": now["environment"] | {"options": options}}
    (found,) = differences(old, now)
    assert found.rule == FREE and "sk-old" not in str(found)


def test_the_commands_of_a_plan_show_a_secret_as_a_variable():
    overrides = ["environment.name=http", "environment.options.url=http://host", f"environment.options.api_key={TYPED}"]
    for command in launch_commands(load([*overrides, "cluster.num_gpus=16"]), overrides):
        assert TYPED not in command and "'environment.options.api_key=${oc.env:ENVIRONMENT_OPTIONS_API_KEY}'" in command


def test_libraries_that_record_the_command_line_see_no_secret(monkeypatch, data, tmp_path):
    arguments = [f"environment.options.api_key={TYPED}", "environment.name=http", "environment.options.url=http://host"]
    monkeypatch.setattr(sys, "argv", ["selfdistill", "train", *arguments])
    monkeypatch.setattr(train, "train", lambda *rest: 0)
    assert main(arguments) == 0
    assert sys.argv[2:] == ["environment.options.api_key=${oc.env:ENVIRONMENT_OPTIONS_API_KEY}", *arguments[1:]]


def test_a_run_writes_no_secret_of_its_command_line_and_warns(ranks, data, tmp_path):
    run = tmp_path / "run"
    options = [
        f"environment.options.password={TYPED}",
        "environment.name=replying.Keyed",
        "metrics.console_every=1",
        "metrics.loggers=[tensorboard,recorded_logger.RecordedLogger]",
        "report.every=1",
        "num_steps=1",
    ]
    arguments = tiny_run.overrides(data, run, *options)
    for _ in range(2):
        [(status, output)] = ranks.run(tiny_run.start_and_listen, arguments, world_size=1, init_process_group=False)
        assert status == 0, output
        assert "environment.options.password='${oc.env:ENVIRONMENT_OPTIONS_PASSWORD}'" in output and TYPED not in output
    assert files_with(TYPED, run) == []
    assert "password: ${oc.env:ENVIRONMENT_OPTIONS_PASSWORD}" in (run / "config.yaml").read_text()
    assert "'environment.options.password=${oc.env:ENVIRONMENT_OPTIONS_PASSWORD}'" in (run / "events.jsonl").read_text()
