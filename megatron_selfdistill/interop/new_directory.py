# Copyright (c) 2026 the megatron_selfdistill authors. Apache-2.0.
"""Make the directory of a conversion: complete under its name, or not at all."""

from __future__ import annotations

import contextlib
import shutil
from collections.abc import Iterator
from pathlib import Path

from megatron_selfdistill.checkpoint.formats.directory import begin
from megatron_selfdistill.checkpoint.formats.manifest import sync
from megatron_selfdistill.errors import CheckpointError


@contextlib.contextmanager
def created(target: Path, num_bytes: int) -> Iterator[Path]:
    """Yield a temporary directory, and rename it to ``target`` at the end; remove it after an error.

    The caller syncs the files.
    Raises: CheckpointError where ``target`` exists, or the disk has less than ``num_bytes`` and 1 MiB free.
    """
    target = target.absolute()
    temporary = begin(target.parent, target.name, num_bytes + 2**20)
    try:
        yield temporary
        require_free(target)
        sync(temporary)
        temporary.rename(target)
        sync(target.parent)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


def require_free(target: Path) -> None:
    """Raise CheckpointError if ``target`` exists and is not an empty directory."""
    if target.exists() and (not target.is_dir() or next(target.iterdir(), None) is not None):
        raise CheckpointError(f"{target} exists and is not overwritten: choose another name, or remove it")
