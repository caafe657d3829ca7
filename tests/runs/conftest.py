# Copyright (c) 2026 the megatron_selfdistill authors. Apache-2.0.
"""The finished run as a start of other runs, and a copy of it, which a test may change."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest


@pytest.fixture
def run(finished, tmp_path) -> Path:
    """Return a copy of the finished run."""
    return Path(shutil.copytree(finished, tmp_path / "run"))


@pytest.fixture(scope="session")
def start(finished) -> str:
    """Return the override that starts runs of every layout from the same weights: random ones depend on the layout."""
    return f"checkpoint.load={finished}/checkpoints"
