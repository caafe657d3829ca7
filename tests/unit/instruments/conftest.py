# Copyright (c) 2026 the megatron_selfdistill authors. Apache-2.0.
"""The model that the tests of the commands on given models read."""

from __future__ import annotations

from pathlib import Path

import pytest
import tiny
from shared import SharedDirectories


@pytest.fixture(scope="session")
def untrained(shared: SharedDirectories) -> Path:
    """Return the directory of `tiny.model_with_data` with 12 problems, into which no test writes."""
    return shared.get("untrained", lambda directory: tiny.model_with_data(directory, 12))
