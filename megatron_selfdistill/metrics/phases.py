# Copyright (c) 2026 the megatron_selfdistill authors. Apache-2.0.
"""The phases of a step: their seconds, tokens per second and memory, and what the console shows of them."""

from __future__ import annotations

import contextlib
import time
from collections.abc import Iterator
from typing import TypeAlias

import torch

from megatron_selfdistill.distributed import signs_of_life
from megatron_selfdistill.metrics.phase_progress import PhaseProgress

Mark: TypeAlias = "float | torch.cuda.Event"
"""A point in time: seconds of this process's clock, or an event in the device's queue."""


class Phases:
    """The clock of the phases of a step on this rank.

        with phases("rollout"):
            ...
        metrics |= phases.metrics(rollout=num_tokens)

    A phase lasts from the moment when the device (the current device, unless given) has finished the work queued before
    the phase until it has finished the work queued in the phase.  On a GPU, events mark both moments, so no phase makes
    the host wait; `metrics` waits once.  A phase that is entered again adds to its time.
    The beginning and the end of a phase are signs of progress (distributed/signs_of_life.py).  A listener hears of both
    at once, by the host's clock, and never waits for the device.
    """

    def __init__(self, device: torch.device | None = None) -> None:
        self.device = torch.device("cuda" if torch.cuda.is_available() else "cpu") if device is None else device
        self._spans: list[tuple[str, Mark, Mark]] = []
        self._began = time.perf_counter()
        self.listener: PhaseProgress | None = None
        """The object that hears of the phases of this rank; None on ranks that show nothing."""

    @contextlib.contextmanager
    def __call__(self, name: str) -> Iterator[None]:
        """Time the phase ``name`` from the entry of this context to its end."""
        start = self._mark()
        signs_of_life.entered(name)
        listener = self.listener
        if listener is not None:
            listener.entered(name)
        try:
            yield
        finally:
            if listener is not None:
                listener.left()
        signs_of_life.left(name)
        self._spans.append((name, start, self._mark()))

    def counted(self, finished: int, total: int, whose: str) -> None:
        """Pass on to the listener, if there is any, how many responses are finished (`rollout.base.Progress`)."""
        if self.listener is not None:
            self.listener.counted(finished, total, whose)

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
        """Return the times since the last call, by this rank's clock, and reset them; the ranks get different values.

        docs/metrics.md defines the keys.  ``tokens``: those of the global batch by phase, for tokens_per_second/PHASE.
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
    return float(start.elapsed_time(end)) / 1000


def _memory(device: torch.device) -> dict[str, float]:
    if device.type == "cuda":
        return {"memory/peak_gib": torch.cuda.max_memory_allocated(device) / 2**30}
    import psutil

    return {"memory/rss_gib": psutil.Process().memory_info().rss / 2**30}
