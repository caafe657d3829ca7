# Copyright (c) 2026 the megatron_selfdistill authors. Apache-2.0.
"""Whole runs that several tests read, a copy of the finished one, and weights at which other runs start."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest
from tiny_run import Runs


@pytest.fixture(scope="session")
def runs(ranks, data, tmp_path_factory) -> Runs:
    """Return the runs of this session, each of which is trained at its first request."""
    return Runs(ranks, data, tmp_path_factory.mktemp("runs"))


@pytest.fixture
def run(finished, tmp_path) -> Path:
    return Path(shutil.copytree(finished, tmp_path / "run"))


@pytest.fixture(scope="session")
def start(finished) -> str:
    """Return the override that starts runs of every layout from the same weights: random ones depend on the layout."""
    return f"checkpoint.load={finished}/checkpoints"


@pytest.fixture(scope="session")
def early(runs) -> str:
    """Return the override that starts runs from weights after one step, whose responses are of many kinds."""
    return f"checkpoint.load={runs('num_steps=1', 'checkpoint.save_every=1')}/checkpoints"
