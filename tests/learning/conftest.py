# Copyright (c) 2026 the megatron_selfdistill authors. Apache-2.0.
"""One base model for all tests of the examples."""

from __future__ import annotations

import dataclasses
import sys
from collections.abc import Callable
from pathlib import Path
from types import ModuleType

import pytest
import torch
from scripts import load_script

REPOSITORY = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(REPOSITORY / "examples"))  # as `python examples/...` does


def example(name: str) -> ModuleType:
    """``examples/<name>.py`` as a module; its name begins with a number and cannot be imported."""
    return load_script(REPOSITORY / "examples" / f"{name}.py")


@pytest.fixture(scope="session")
def load_example():
    """Return `example`, which loads an example."""
    return example


@pytest.fixture
def shorten_pretraining(monkeypatch: pytest.MonkeyPatch) -> Callable[[ModuleType, int], None]:
    """Return a function that sets the steps of pretraining of a module's task, for one test."""

    def shorten(module: ModuleType, num_steps: int) -> None:
        monkeypatch.setattr(module, "TASK", dataclasses.replace(module.TASK, pretraining_steps=num_steps))

    return shorten


@pytest.fixture(scope="session", autouse=True)
def one_thread():
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture(scope="session")
def root(tmp_path_factory):
    """Return the ``--directory`` of every example in this session."""
    return tmp_path_factory.mktemp("runs")


@pytest.fixture(scope="session")
def base(root):
    """Return the fully pretrained base of the quickstart with seed 5."""
    from _lib import pretraining, subtraction

    return pretraining.make_base(subtraction.TASK, 5, root / "bases")
