# Copyright (c) 2026 the megatron_selfdistill authors. Apache-2.0.
"""What a run says before its first step; the command that repeats a launch, and the commit of a checkout."""

from __future__ import annotations

import shlex

import pytest

from megatron_selfdistill.commands import announcement
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
