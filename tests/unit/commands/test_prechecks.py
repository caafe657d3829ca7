# Copyright (c) 2026 the megatron_selfdistill authors. Apache-2.0.
"""A package that a run needs in this environment is named before anything is built."""

from __future__ import annotations

import sys
from types import ModuleType

import pytest

from megatron_selfdistill import train
from megatron_selfdistill.commands import prechecks
from megatron_selfdistill.commands.prechecks import require_packages
from megatron_selfdistill.config import load
from megatron_selfdistill.errors import ConfigError

SERVERS = ("rollout.engine=vllm", "rollout.placement=server", "rollout.servers=[http://n1:8000]")


@pytest.fixture
def absent(monkeypatch):
    """Hide vLLM, where the machine that runs the tests has it."""
    monkeypatch.setattr("importlib.util.find_spec", lambda _: None)
    monkeypatch.delitem(sys.modules, "vllm", raising=False)


def test_a_missing_package_is_one_message_before_anything_is_built(absent, monkeypatch, capsys):
    monkeypatch.setattr(prechecks, "RUN", {})
    assert train.main(["rollout.engine=vllm", "data.path=none.jsonl", "data.tokenizer=none", "run_dir=none"]) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert "rollout.engine=vllm needs vllm, which this Python lacks: run pip install -e '.[vllm]'" in line


def test_a_package_of_every_run_that_is_missing_is_named_with_its_extra(monkeypatch):
    monkeypatch.setattr(prechecks, "RUN", {"megatron-core": "megatron.absent"})
    with pytest.raises(ConfigError, match=r"a run needs megatron-core, .*: run pip install -e '\.\[train\]'"):
        require_packages(load([]))


@pytest.mark.parametrize("overrides", [[], SERVERS, ["recipe=chat_logs", "rollout.engine=vllm"]])
def test_a_package_that_is_not_needed_here_is_not_missed(absent, monkeypatch, overrides):
    monkeypatch.setattr(prechecks, "RUN", {})
    require_packages(load([*overrides]))
    monkeypatch.setitem(sys.modules, "vllm", ModuleType("vllm"))
    require_packages(load(["rollout.engine=vllm"]))
