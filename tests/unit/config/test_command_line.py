# Copyright (c) 2026 the megatron_selfdistill authors. Apache-2.0.
"""The command line: the order of its arguments, files of keys, refusals, and Ctrl-C."""

from __future__ import annotations

import os
import signal

import pytest

from megatron_selfdistill import config as configuration
from megatron_selfdistill.config import command_line
from megatron_selfdistill.train import EXIT_BAD_INPUT, main


def printed(capsys, *arguments: str) -> str:
    assert main(list(arguments)) == 0
    return capsys.readouterr().out


def test_keys_may_stand_on_both_sides_of_a_flag_and_a_dry_run_is_one_too(capsys, tmp_path):
    (tmp_path / "model").mkdir()
    (tmp_path / "model" / "ours.yaml").write_text("num_layers: 6\n")
    flags = ["--config-dir", str(tmp_path), "model=ours", "--dry-run", "--print", "num_steps=7"]
    lines = printed(capsys, "seed=3", *flags).splitlines()
    assert {"seed: 3", "num_steps: 7", "  num_layers: 6", "dry_run: true"} <= set(lines)


MINE = """
recipe: teacher_alone
run_dir: "runs/with 'quotes' and, commas"
num_steps: 5
optimizer: {lr: 1e-5, lr_decay: {style: cosine}}
data: {path: null, teacher_template: "{problem}: {solution}\\n${oc.env:HOME}", fields: {problem: Q}}
metrics: {loggers: [tensorboard, my.Logger], leak_words: ["a hint, or two", "it's"]}
teachers: {math: {load: DIR, view: {system_prompt: Think.}}}
guards.max_loop_rise: null
"""


def test_a_file_has_the_keys_of_a_run_and_the_command_line_comes_after_it(tmp_path):
    file = tmp_path / "my.yaml"
    file.write_text(MINE)
    config = configuration.load(command_line.parse([str(file), "steps=7", "lr=2e-5"]).overrides)
    assert (config.num_steps, config.optimizer.lr, config.optimizer.lr_decay.style) == (7, 2e-5, "cosine")
    assert (config.run_dir, config.target.rule) == ("runs/with 'quotes' and, commas", "teacher_alone")
    assert config.data.path is None and config.data.fields == {"problem": "Q"}
    assert config.data.teacher_template == f"{{problem}}: {{solution}}\n{os.environ['HOME']}"
    assert config.metrics.loggers == ["tensorboard", "my.Logger"]
    assert config.metrics.leak_words == ["a hint, or two", "it's"]
    assert config.teachers == {"math": {"load": "DIR", "view": {"system_prompt": "Think."}}}
    assert config.guards.max_loop_rise is None


@pytest.mark.full
def test_the_configuration_that_a_run_has_written_starts_the_same_run(tmp_path):
    written = ["recipe=grpo", "model=llama_1b", "run_dir=x", "data.path=a b.jsonl", "data.fields.problem=question"]
    config = configuration.load([*written, "optimizer.lr=3e-6", "metrics.leak_words=[]"])
    (tmp_path / "config.yaml").write_text(configuration.to_yaml(config))
    assert configuration.load(command_line.parse([str(tmp_path / "config.yaml")]).overrides) == config


@pytest.mark.parametrize(
    ("arguments", "content", "named"),
    [
        (["my.yaml"], None, "my.yaml"),
        (["my.yaml"], "- a", "my.yaml"),
        (["my.yaml"], "a: [", "my.yaml"),
        (["my.yaml"], "optimizer: {lrr: 1}", "'optimizer.lrr'"),
        (["seed=1", "--learning-rate=1e-5", "x"], None, "--learning-rate=1e-5"),
        (["--data", "x"], None, "--data"),
    ],
)
def test_what_is_no_configuration_and_no_option_is_refused_by_its_name(
    capsys, monkeypatch, tmp_path, arguments, content, named
):
    monkeypatch.chdir(tmp_path)
    if content is not None:
        (tmp_path / "my.yaml").write_text(content)
    assert main(arguments) == EXIT_BAD_INPUT
    (line,) = capsys.readouterr().err.splitlines()
    assert named in line


def test_ctrl_c_before_a_run_is_status_130_without_a_traceback(monkeypatch, capsys):
    def interrupted(*args: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(configuration, "load", interrupted)
    monkeypatch.setattr(signal, "getsignal", lambda number: signal.default_int_handler)  # not behind `&`
    assert main(["run_dir=here"]) == 130
    assert capsys.readouterr().err == ""
