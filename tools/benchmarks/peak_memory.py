# Copyright (c) 2026 the megatron_selfdistill authors. Apache-2.0.
"""The most memory that a piece of work holds at one time, on a CPU and on a GPU."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch


def wait() -> None:
    """Wait for the device."""
    if torch.cuda.is_available():
        torch.cuda.synchronize()


def peak_bytes(run: Callable[[], Any], device: torch.device) -> int:
    """Return the most memory at one time during ``run()``, beyond the memory that was allocated before."""
    wait()
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        result = run()
        wait()
        del result
        return torch.cuda.max_memory_allocated() - before
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True) as profiler:
        result = run()
        del result
    now = peak = 0
    for event in sorted(profiler.profiler.kineto_results.events(), key=lambda event: event.start_ns()):
        if event.name() == "[memory]":
            now += event.nbytes()
            peak = max(peak, now)
    return peak
