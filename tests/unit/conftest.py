# Copyright (c) 2026 the megatron_selfdistill authors. Apache-2.0.
"""Hugging Face directories of tiny models, disks of a megabyte, and collectives of a single rank."""

from __future__ import annotations

import os
import subprocess
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest


@pytest.fixture(scope="session")
def hf_directory(shared) -> Callable[[str], Path]:
    """Kind -> a directory with a random model of `hf_models.CONFIGS`, made once per test run."""

    def directory(kind: str) -> Path:
        import hf_models  # reads the annex interop, which most rooms do without

        return shared.get(f"hf_{kind}", lambda directory: hf_models.write(kind, directory))

    return directory


@pytest.fixture
def one_rank(monkeypatch) -> None:
    """Make collectives return the part of this rank, without a process group."""
    import torch.distributed as dist

    monkeypatch.setattr(dist, "all_reduce", lambda tensor, op=None, group=None: tensor)
    monkeypatch.setattr("megatron_selfdistill.evaluation.verify.gather_objects", lambda value: [value])


@pytest.fixture
def small_disk(tmp_path) -> Iterator[Callable[[str], Path]]:
    """Return a function from a size such as "512k" to an empty file system; skip where this user may not mount."""
    directory = tmp_path / "small"
    directory.mkdir()

    def mounted(size: str) -> Path:
        mount = ["mount", "-t", "tmpfs", "-o", f"size={size}", "tmpfs", str(directory)]
        if os.geteuid() != 0 or subprocess.run(mount, capture_output=True).returncode != 0:
            pytest.skip("may not mount a file system here")
        return directory

    yield mounted
    if os.path.ismount(directory):
        subprocess.run(["umount", "-l", str(directory)], check=True)  # lazily: a traceback may hold a file open
