# Copyright (c) 2026 the megatron_selfdistill authors. Apache-2.0.
"""Hugging Face folders of tiny models and disks of a megabyte, for the tests of conversions."""

from __future__ import annotations

import functools
import os
import subprocess
from collections.abc import Callable, Iterator
from pathlib import Path

import hf_models
import pytest


@pytest.fixture(scope="session")
def hf_folder(tmp_path_factory) -> Callable[[str], Path]:
    """kind -> a folder with a random model of `hf_models.CONFIGS`, made once."""

    @functools.cache
    def make(kind: str) -> Path:
        folder = tmp_path_factory.mktemp("hf") / kind
        hf_models.write(kind, folder)
        return folder

    return make


@pytest.fixture
def small_disk(tmp_path) -> Iterator[Callable[[str], Path]]:
    """ "512k" -> an empty file system of that size; skips where this user may not mount one."""
    folder = tmp_path / "small"
    folder.mkdir()

    def mounted(size: str) -> Path:
        mount = ["mount", "-t", "tmpfs", "-o", f"size={size}", "tmpfs", str(folder)]
        if os.geteuid() != 0 or subprocess.run(mount, capture_output=True).returncode != 0:
            pytest.skip("may not mount a file system here")
        return folder

    yield mounted
    if os.path.ismount(folder):
        subprocess.run(["umount", "-l", str(folder)], check=True)  # lazily: a traceback may hold a file open
