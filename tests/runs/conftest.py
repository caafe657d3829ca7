# Copyright (c) 2026 the megatron_selfdistill authors. Apache-2.0.
"""A copy of the finished run, which a test may change."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest


@pytest.fixture
def run(finished, tmp_path) -> Path:
    """Return a copy of the finished run."""
    return Path(shutil.copytree(finished, tmp_path / "run"))
