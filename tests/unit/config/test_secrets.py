# Copyright (c) 2026 the megatron_selfdistill authors. Apache-2.0.
"""A run uses the values of ``${oc.env:NAME}``, and neither writes nor prints them."""

from __future__ import annotations

import dataclasses
import json
import os
from pathlib import Path
from types import SimpleNamespace

import pytest
import tiny_run
from omegaconf import OmegaConf
from reported_runs import blocks_of

from megatron_selfdistill import train
from megatron_selfdistill.config import from_mapping, load, to_yaml, writable
from megatron_selfdistill.errors import ConfigError
from megatron_selfdistill.hidden_values import SHORTEST_HIDDEN, hidden
from megatron_selfdistill.plan.launch import launch_commands
from megatron_selfdistill.sources.chat_logs import list_skipped
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
        "rollout.servers=['http://me:${oc.env:LAB_SECRET}@node:80']",
        "rollout.servers[0]",
        f"http://me:{SECRET}@node:80",
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
        "metrics.console=true",
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
