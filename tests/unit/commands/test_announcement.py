# Copyright (c) 2026 the megatron_selfdistill authors. Apache-2.0.
"""What a run says before its first step; the command that repeats a launch, and the commit of a checkout."""

from __future__ import annotations

import shlex
import subprocess

import pytest

from megatron_selfdistill.commands import announcement
from megatron_selfdistill.config import GivenKeys
from megatron_selfdistill.config.command_line import parse
from megatron_selfdistill.data.problems import Problem


@pytest.mark.parametrize(
    ("solutions", "warns"),
    [(["Be brief."] * 3, True), (["Be brief.", "Be brief.", "4"], False), ([""] * 3, False), (["Be brief."], False)],
)
def test_a_run_speaks_of_the_anchor_if_all_hints_are_one_text(solutions, warns):
    problems = [Problem(str(number), (), solution, None, "p.jsonl:1") for number, solution in enumerate(solutions)]
    warning, line = (announcement.about_one_hint(anchor, problems) or "" for anchor in ("reference", "student"))
    assert warning.startswith("warning") == ("target.anchor=student" in line) == warns


@pytest.mark.parametrize(
    ("world_size", "per_node", "launcher"),
    [
        (1, None, "selfdistill train"),
        (8, 8, "torchrun --standalone --nproc-per-node=8 -m megatron_selfdistill train"),
        (16, 8, "torchrun --nnodes=2 --nproc-per-node=8 -m megatron_selfdistill train"),
    ],
)
def test_the_command_starts_the_same_run_again(monkeypatch, world_size, per_node, launcher, tmp_path):
    monkeypatch.delenv("PYTHONPATH", raising=False)
    monkeypatch.chdir(tmp_path)
    (tmp_path / "my configs").mkdir()
    if per_node is not None:
        monkeypatch.setenv("LOCAL_WORLD_SIZE", str(per_node))
    given = GivenKeys(["recipe=literal", "data.system_prompt=two words"], "quickstart", ["my configs"])
    command = announcement._command(given.arguments, world_size)
    assert command.startswith(f"{launcher} --config-name quickstart --config-dir 'my configs' ")
    arguments = parse(shlex.split(command.removeprefix(launcher)))
    assert arguments.overrides == ["recipe=literal", "data.system_prompt=two words"]
    assert (arguments.config_name, arguments.config_dir) == ("quickstart", ["my configs"])
    monkeypatch.setenv("PYTHONPATH", "my examples")  # where functions of the user are found
    assert announcement._command(["seed=1"], world_size) == f"env 'PYTHONPATH=my examples' {launcher} seed=1"


def git(directory, *arguments):
    identity = ["-c", "user.name=n", "-c", "user.email=e"]
    subprocess.run(["git", "-C", str(directory), *identity, *arguments], check=True, capture_output=True)


def test_the_commit_is_that_of_the_checkout_and_says_if_files_differ(tmp_path):
    (tmp_path / "__init__.py").write_text("")
    assert announcement.commit(tmp_path) is None, "no checkout"
    git(tmp_path, "init")
    assert announcement.commit(tmp_path) is None, "git does not track the package"
    git(tmp_path, "add", ".")
    git(tmp_path, "commit", "-m", "first")
    found = announcement.commit(tmp_path)
    assert len(found) == 40 and set(found) <= set("0123456789abcdef")
    (tmp_path / "__init__.py").write_text("changed = 1")
    assert announcement.commit(tmp_path) == f"{found} + changes"
