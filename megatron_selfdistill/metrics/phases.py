# Copyright (c) 2026 the megatron_selfdistill authors. Apache-2.0.
"""Seconds and tokens per second of the phases of a step, and the memory they took."""

from __future__ import annotations

import contextlib
import time
from collections.abc import Iterator
from typing import TypeAlias

import torch

from megatron_selfdistill.distributed import watchdog

Mark: TypeAlias = "float | torch.cuda.Event"
"""A point of time: seconds of this process's clock, or an event in the device's queue."""


class Phases:
    """Times the phases of a step on this rank::

        with phases("rollout"):
            ...
        metrics |= phases.metrics(rollout=num_tokens)

    A phase lasts from when the device (the current one, unless given) has done what was queued before it until it has
    done what was queued in it.  On a GPU events mark both, so that no phase makes the host wait; `metrics` waits once.
    A phase entered again adds up.
    Beginning and end are signs of progress (distributed/watchdog.py).
    """

    def __init__(self, device: torch.device | None = None) -> None:
        self.device = torch.device("cuda" if torch.cuda.is_available() else "cpu") if device is None else device
        self._spans: list[tuple[str, Mark, Mark]] = []
        self._began = time.perf_counter()

    @contextlib.contextmanager
    def __call__(self, name: str) -> Iterator[None]:
        start = self._mark()
        watchdog.entered(name)
        yield
        watchdog.left(name)
        self._spans.append((name, start, self._mark()))

    def _mark(self) -> Mark:
        if self.device.type != "cuda":
            return time.perf_counter()
        event = torch.cuda.Event(enable_timing=True)
        event.record(torch.cuda.current_stream(self.device))
        return event

    def _seconds(self) -> dict[str, float]:
        """Return the seconds of every phase since the last call of `metrics`; waits for the device."""
        if self._spans and self.device.type == "cuda":
            torch.cuda.synchronize(self.device)
        seconds: dict[str, float] = {}
        for name, start, end in self._spans:
            seconds[name] = seconds.get(name, 0.0) + _seconds_between(start, end)
        return seconds

    def metrics(self, **tokens: float) -> dict[str, float]:
        """What was timed since the last call, which begins anew; this rank's clock, not equal on all ranks.

        seconds/PHASE; seconds/step, all of the time between the calls; tokens_per_second/PHASE for each
        ``PHASE=tokens`` (of the global batch, as a phase lasts equally long everywhere); memory/peak_gib,
        the most so far allocated on the device, or on CPU memory/rss_gib, resident in this process.
        """
        by_phase = self._seconds()
        now = time.perf_counter()
        metrics = {f"seconds/{name}": seconds for name, seconds in by_phase.items()}
        metrics["seconds/step"] = now - self._began
        for name, count in tokens.items():
            if by_phase.get(name, 0.0) > 0:
                metrics[f"tokens_per_second/{name}"] = count / by_phase[name]
        self._spans, self._began = [], now
        return metrics | _memory(self.device)


def _seconds_between(start: Mark, end: Mark) -> float:
    if isinstance(start, float) or isinstance(end, float):
        assert isinstance(start, float) and isinstance(end, float)
        return end - start
    return start.elapsed_time(end) / 1000


def _memory(device: torch.device) -> dict[str, float]:
    if device.type == "cuda":
        return {"memory/peak_gib": torch.cuda.max_memory_allocated(device) / 2**30}
    import psutil

    return {"memory/rss_gib": psutil.Process().memory_info().rss / 2**30}
