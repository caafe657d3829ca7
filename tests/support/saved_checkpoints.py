# Copyright (c) 2026 the megatron_selfdistill authors. Apache-2.0.
"""The contents of the directories of saved checkpoints, and the messages of refusals on a rank."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from pathlib import Path

import pytest


def tensor_keys(path: Path) -> set[str]:
    """Return the keys of the tensors in the checkpoint ``path``."""
    from megatron.core import dist_checkpointing

    return set(dist_checkpointing.load_tensors_metadata(str(path)))


def checkpoint_names(run_dir: Path) -> list[str]:
    """Return the names in the directory of a run's checkpoints, in order."""
    return sorted(path.name for path in (run_dir / "checkpoints").iterdir())


@contextlib.contextmanager
def raises(message: str) -> Iterator[None]:
    """Assert that the context raises `CheckpointError` with a message that matches ``message``."""
    from megatron_selfdistill.errors import CheckpointError

    with pytest.raises(CheckpointError, match=message):
        yield
