# Copyright (c) 2026 the megatron_selfdistill authors. Apache-2.0.
"""In a process of the Triton kernels, the laws of the loss are those of every backend; see kernel_cases.py."""

from __future__ import annotations

from pathlib import Path

import kernel_cases
import pytest

HERE = Path(__file__).resolve().parent


@pytest.hookimpl(tryfirst=True)
def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """Leave out what holds for PyTorch alone, and most of what Triton's interpreter takes long for."""
    of_loss = [item for item in items if item.path.parent == HERE]
    kept = {id(item) for item in kernel_cases.keep_laws(of_loss)}
    left_out = [item for item in of_loss if id(item) not in kept]
    items[:] = [item for item in items if item not in left_out]
    config.hook.pytest_deselected(items=left_out) if left_out else None


@pytest.fixture(autouse=kernel_cases.BACKEND == "triton")
def parts(monkeypatch: pytest.MonkeyPatch, request: pytest.FixtureRequest) -> int:
    """Cut rows into 1, 2 or 5 parts, which depends on the test's name."""
    return kernel_cases.cut_rows(monkeypatch, kernel_cases.parts_of(request.node.name))
