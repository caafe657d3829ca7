# Copyright (c) 2026 the megatron_selfdistill authors. Apache-2.0.
"""The command line: its descriptions of itself, the order of its arguments, and its imports before a refusal."""

from __future__ import annotations

import os
import signal

import pytest

from megatron_selfdistill import config as configuration
from megatron_selfdistill.config import command_line
from megatron_selfdistill.config.key_list import config_dir
from megatron_selfdistill.train import EXIT_BAD_INPUT, main


def printed(capsys, *arguments: str) -> str:
    assert main(list(arguments)) == 0
    return capsys.readouterr().out


def test_keys_lists_every_key_once_below_the_title_of_its_section(capsys):
    lines = printed(capsys, "--keys").splitlines()
    for key, (default, doc, _) in configuration.keys().items():
        assert lines.count(f"{key}={default}") == 1 and f"    {doc}" in lines
    title = "== rollout: The sampling of the student's responses =="
    assert lines.index(title) < lines.index("rollout.engine=megatron")
    assert lines[lines.index("optimizer.lr=1e-06") + 3] == "    Short: lr="
    assert lines.index("num_steps=100") < lines.index(next(line for line in lines if line.startswith("== model")))


def test_keys_searches_names_and_meanings_for_a_word_that_is_no_section(capsys):
    def found(word: str) -> list[str]:
        lines = printed(capsys, "--keys", word).splitlines()
        return [line.partition("=")[0] for line in lines if not line.startswith((" ", "=", "("))]

    assert {"optimizer.lr", "optimizer.min_lr", "optimizer.lr_warmup_steps"} <= set(found("lr"))
    assert "checkpoint.load" not in found("lr"), "already is no word with lr"
    assert "target.anchor" in found("stands still") and found("STANDS STILL") == found("stands still")


def test_recipes_lists_each_recipe_with_what_it_is_also_a_labs_own(capsys, tmp_path):
    (tmp_path / "recipe").mkdir()
    (tmp_path / "recipe" / "ours.yaml").write_text("# @package _global_\n# Our own one.  With more.\nnum_steps: 3\n")
    lines = printed(capsys, "--recipes", "--config-dir", str(tmp_path)).splitlines()
    assert {line.split()[0] for line in lines} == {
        "recipe=ours",
        *(f"recipe={file.stem}" for file in (config_dir() / "recipe").glob("*.yaml")),
    }
    assert lines[-1].split(maxsplit=1)[1] == "Our own one."
    assert all(len(line.split(maxsplit=1)[1]) > 10 for line in lines)


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
