# Copyright (c) 2026 the megatron_selfdistill authors. Apache-2.0.
"""A finished run that several files start again, each from a copy."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest
from tiny_run import overrides, train


@pytest.fixture(scope="module")
def finished(ranks, data, tmp_path_factory) -> Path:
    """A run of 6 steps with checkpoints of steps 3 and 6."""
    run = tmp_path_factory.mktemp("finished") / "run"
    train(ranks, overrides(data, run))
    return run


@pytest.fixture
def run(finished, tmp_path) -> Path:
    """A copy of the finished run."""
    return Path(shutil.copytree(finished, tmp_path / "run"))
