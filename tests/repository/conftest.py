# Copyright (c) 2026 the megatron_selfdistill authors. Apache-2.0.
"""The scripts of tools/benchmarks/ as modules."""

from __future__ import annotations

import sys
from collections.abc import Callable
from pathlib import Path
from types import ModuleType

import pytest
from scripts import load_script

REPOSITORY = Path(__file__).resolve().parents[2]
TOOLS = REPOSITORY / "tools" / "benchmarks"


@pytest.fixture
def tools(monkeypatch: pytest.MonkeyPatch) -> Callable[[str], ModuleType]:
    """Return a function that loads a script of tools/benchmarks/, which imports its neighbours."""
    monkeypatch.setattr(sys, "path", [str(TOOLS), *sys.path])
    return lambda name: load_script(TOOLS / f"{name}.py")
