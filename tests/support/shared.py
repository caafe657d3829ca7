# Copyright (c) 2026 the megatron_selfdistill authors. Apache-2.0.
"""Directories that all tests of a run read and none changes: models, data, finished runs, each made once."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
from filelock import FileLock


class SharedDirectories:
    """Directories below one root, which the workers of pytest-xdist have in common."""

    def __init__(self, root: Path) -> None:
        self._root = root

    def get(self, name: str, make: Callable[[Path], object]) -> Path:
        """Return the directory of that name; the first call of any worker makes it with ``make(directory)``."""
        directory, made = self._root / name, self._root / f"{name}.made"
        with FileLock(self._root / f"{name}.lock"):
            if not made.exists():
                make(directory)
                made.touch()
        return directory


@pytest.fixture(scope="session")
def shared(tmp_path_factory: pytest.TempPathFactory, request: pytest.FixtureRequest) -> SharedDirectories:
    """`SharedDirectories` of this run of pytest."""
    base = tmp_path_factory.getbasetemp()
    root = (base.parent if hasattr(request.config, "workerinput") else base) / "shared"
    root.mkdir(exist_ok=True)
    return SharedDirectories(root)
