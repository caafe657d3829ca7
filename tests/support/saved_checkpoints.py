# Copyright (c) 2026 the megatron_selfdistill authors. Apache-2.0.
"""The contents of the directories of saved checkpoints, and the messages of refusals on a rank."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from pathlib import Path

import pytest


def tensor_keys(path: Path) -> set[str]:
    from megatron.core import dist_checkpointing

    return set(dist_checkpointing.load_tensors_metadata(str(path)))


def checkpoint_names(run_dir: Path) -> list[str]:
    return sorted(path.name for path in (run_dir / "checkpoints").iterdir())


@contextlib.contextmanager
def raises(message: str) -> Iterator[None]:
    from megatron_selfdistill.errors import CheckpointError

    with pytest.raises(CheckpointError, match=message):
        yield
