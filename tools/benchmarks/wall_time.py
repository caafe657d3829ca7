# Copyright (c) 2026 the megatron_selfdistill authors. Apache-2.0.
"""Wall seconds of a piece of work, on a CPU and on a GPU."""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Any

import torch


def seconds_of(work: Callable[[], Any]) -> float:
    """Return the wall seconds of ``work()``, from when this process's GPU is idle until it is idle again."""
    if torch.cuda.is_available():
        torch.cuda.synchronize()
    began = time.perf_counter()
    work()
    if torch.cuda.is_available():
        torch.cuda.synchronize()
    return time.perf_counter() - began
