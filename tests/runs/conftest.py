# Copyright (c) 2026 the megatron_selfdistill authors. Apache-2.0.
"""Starts of other runs: the finished run, a copy of it, which a test may change, and weights after one step."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest
from tiny_run import overrides, train


@pytest.fixture
def run(finished, tmp_path) -> Path:
    """Return a copy of the finished run."""
    return Path(shutil.copytree(finished, tmp_path / "run"))


@pytest.fixture(scope="session")
def start(finished) -> str:
    """Return the override that starts runs of every layout from the same weights: random ones depend on the layout."""
    return f"checkpoint.load={finished}/checkpoints"


@pytest.fixture(scope="session")
def early(ranks, data, tmp_path_factory) -> str:
    """Return the override that starts runs from weights after one step, whose responses are of many kinds."""
    run = tmp_path_factory.mktemp("base") / "run"
    train(ranks, overrides(data, run, "num_steps=1"))
    return f"checkpoint.load={run}/checkpoints"
