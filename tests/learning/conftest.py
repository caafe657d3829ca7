# Copyright (c) 2026 the megatron_selfdistill authors. Apache-2.0.
"""One base model for all tests of the examples."""

from __future__ import annotations

import dataclasses
import shutil
import sys
from collections.abc import Callable
from pathlib import Path
from types import ModuleType

import pytest
import torch
from scripts import load_script

REPOSITORY = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(REPOSITORY / "examples"))  # as `python examples/...` does


@pytest.fixture(scope="session")
def load_example() -> Callable[[str], ModuleType]:
    """Return a function that loads ``examples/<name>.py``, whose name begins with a number and cannot be imported."""
    return lambda name: load_script(REPOSITORY / "examples" / f"{name}.py")


@pytest.fixture
def shorten(monkeypatch: pytest.MonkeyPatch) -> Callable[[ModuleType, int, int], None]:
    """Return a function that sets the steps of pretraining and the number of held-out problems of a module's task.

    The settings last for one test.
    """

    def set_both(module: ModuleType, num_steps: int, num_held_out: int = 20) -> None:
        task = module.TASK
        few = {"held_out_problems": lambda: task.held_out_problems()[:num_held_out]}
        monkeypatch.setattr(module, "TASK", dataclasses.replace(task, pretraining_steps=num_steps, **few))

    return set_both


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
def base(root, shared):
    """Return the fully pretrained base of the quickstart with seed 5, which one worker makes for all."""
    from _lib import pretraining, subtraction

    made = shared.get("bases", lambda directory: pretraining.make_base(subtraction.TASK, 5, directory))
    shutil.copytree(made, root / "bases", dirs_exist_ok=True)
    return pretraining.make_base(subtraction.TASK, 5, root / "bases")
