# Copyright (c) 2026 the megatron_selfdistill authors. Apache-2.0.
"""Whether this node computes what it should: the checks of ``tools/doctor.py --selftest``."""

from __future__ import annotations

import os

_ENVIRONMENT = {
    "CUDA_DEVICE_MAX_CONNECTIONS": "1",  # the order of launches under TP (parallel.py)
    "CUBLAS_WORKSPACE_CONFIG": ":4096:8",  # sums that repeat their last bits
    "NCCL_ALGO": "^NVLS",  # likewise
}


def set_environment() -> None:
    """What CUDA and NCCL read when they start, unless it is set: before torch looks for GPUs."""
    for name, value in _ENVIRONMENT.items():
        os.environ.setdefault(name, value)
