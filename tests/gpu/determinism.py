# Copyright (c) 2026 the megatron_selfdistill authors. Apache-2.0.
"""Sums that repeat their last bits on GPUs, for the stages that compare whole runs."""

from __future__ import annotations

import contextlib
import os
import warnings
from collections.abc import Iterator
from typing import Any

import torch

_TE_SWITCH = "NVTE_ALLOW_NONDETERMINISTIC_ALGO"
_ENVIRONMENT = {
    "CUDA_DEVICE_MAX_CONNECTIONS": "1",  # the order of launches under TP (distributed/ranks.py)
    "CUBLAS_WORKSPACE_CONFIG": ":4096:8",
    "NCCL_ALGO": "^NVLS",
}


def set_environment() -> None:
    """Set the variables that CUDA and NCCL read when they start, unless they are set."""
    for name, value in _ENVIRONMENT.items():
        os.environ.setdefault(name, value)


@contextlib.contextmanager
def deterministic(on_gpu: bool) -> Iterator[None]:
    """Use kernels that repeat their last bits on GPUs; the kernels of a CPU always do."""
    if not on_gpu:
        yield
        return
    switches: Any = torch.utils.deterministic
    before, filling = torch.are_deterministic_algorithms_enabled(), switches.fill_uninitialized_memory
    allowed = os.environ.get(_TE_SWITCH)
    torch.use_deterministic_algorithms(True, warn_only=True)
    switches.fill_uninitialized_memory = False
    os.environ[_TE_SWITCH] = "0"  # Transformer Engine reads it when it builds a layer
    try:
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", message=".*deterministic")
            yield
    finally:
        torch.use_deterministic_algorithms(before)
        switches.fill_uninitialized_memory = filling
        if allowed is None:
            del os.environ[_TE_SWITCH]
        else:
            os.environ[_TE_SWITCH] = allowed
