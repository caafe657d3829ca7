# Copyright (c) 2026 the megatron_selfdistill authors. Apache-2.0.
"""The facts of a launch: the command that repeats the launch, and the commit of a checkout."""

from __future__ import annotations

import shlex
import subprocess

import pytest

from megatron_selfdistill import launch_facts
from megatron_selfdistill.config import GivenKeys
from megatron_selfdistill.config.command_line import parse


@pytest.mark.parametrize(
    ("world_size", "per_node", "launcher"),
    [
        (1, None, "selfdistill train"),
        (8, 8, "torchrun --standalone --nproc-per-node=8 -m megatron_selfdistill train"),
        (16, 8, "torchrun --nnodes=2 --nproc-per-node=8 -m megatron_selfdistill train"),
    ],
)
def test_the_command_starts_the_same_run_again(monkeypatch, world_size, per_node, launcher):
    if per_node is not None:
        monkeypatch.setenv("LOCAL_WORLD_SIZE", str(per_node))
    given = GivenKeys(["recipe=literal", "data.system_prompt=two words"], "quickstart", ["my configs"])
    command = launch_facts._command(given.arguments, world_size)
    assert command.startswith(f"{launcher} --config-name quickstart --config-dir 'my configs' ")
    arguments = parse(shlex.split(command.removeprefix(launcher)))
    assert arguments.overrides == ["recipe=literal", "data.system_prompt=two words"]
    assert (arguments.config_name, arguments.config_dir) == ("quickstart", ["my configs"])


def git(directory, *arguments):
    identity = ["-c", "user.name=n", "-c", "user.email=e"]
    subprocess.run(["git", "-C", str(directory), *identity, *arguments], check=True, capture_output=True)


def test_the_commit_is_that_of_the_checkout_and_says_if_files_differ(tmp_path):
    (tmp_path / "__init__.py").write_text("")
    assert launch_facts.commit(tmp_path) is None, "no checkout"
    git(tmp_path, "init")
    assert launch_facts.commit(tmp_path) is None, "git does not track the package"
    git(tmp_path, "add", ".")
    git(tmp_path, "commit", "-m", "first")
    found = launch_facts.commit(tmp_path)
    assert len(found) == 40 and set(found) <= set("0123456789abcdef")
    (tmp_path / "__init__.py").write_text("changed = 1")
    assert launch_facts.commit(tmp_path) == f"{found} + changes"
