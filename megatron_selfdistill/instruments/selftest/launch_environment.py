# Copyright (c) 2026 the megatron_selfdistill authors. Apache-2.0.
"""The environment variables that the self-test sets before torch looks for GPUs."""

from __future__ import annotations

import os
import stat
import tempfile
from pathlib import Path

_ENVIRONMENT = {
    "CUDA_DEVICE_MAX_CONNECTIONS": "1",  # the order of launches under TP (distributed/ranks.py)
    "CUBLAS_WORKSPACE_CONFIG": ":4096:8",  # sums that repeat their last bits
    "NCCL_ALGO": "^NVLS",  # likewise
}


def set_environment() -> None:
    """Set the variables that CUDA, NCCL and the compilers read when they start, unless they are set."""
    for name, value in _ENVIRONMENT.items():
        os.environ.setdefault(name, value)
    share_caches()


def share_caches() -> None:
    """Let the ranks of a node share one cache of compiled kernels on its own disk, unless the variables are set.

    Triton's default lies in the home directory, which nodes often share over a network.  The function does not use a
    directory that belongs to another user or that other users can write to, since Triton runs the code in this cache.
    """
    directory = Path(tempfile.gettempdir()) / f"selfdistill_cache_{os.getuid()}"
    try:
        directory.mkdir(mode=0o700, exist_ok=True)
        found = directory.lstat()
    except OSError:
        return
    if not stat.S_ISDIR(found.st_mode) or found.st_uid != os.getuid() or found.st_mode & 0o022:
        return
    for name, part in (("TRITON_CACHE_DIR", "triton"), ("TORCHINDUCTOR_CACHE_DIR", "inductor")):
        os.environ.setdefault(name, str(directory / part))
