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


def example(name: str) -> ModuleType:
    """``examples/<name>.py`` as a module; its name begins with a number and cannot be imported."""
    return load_script(REPOSITORY / "examples" / f"{name}.py")


@pytest.fixture(scope="session")
def load_example():
    """Return `example`, which loads an example."""
    return example


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


@pytest.fixture(scope="session")
def brief_root(base, tmp_path_factory):
    """Return the ``--directory`` of examples that only run to their end: with the base, and few held-out problems."""
    directory = tmp_path_factory.mktemp("brief_runs")
    copy = Path(shutil.copytree(base.directory, directory / "bases" / base.directory.name))
    held_out = (copy / base.held_out.name).read_text().splitlines(keepends=True)
    (copy / base.held_out.name).write_text("".join(held_out[:20]))
    return directory
