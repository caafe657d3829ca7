# Copyright (c) 2026 the megatron_selfdistill authors. Apache-2.0.
"""Seconds and tokens per second of the phases of a step, and the memory they took."""

from __future__ import annotations

import contextlib
import time
from collections.abc import Iterator

import torch

from megatron_selfdistill import progress


class Phases:
    """Times the phases of a step on this rank::

        with phases("rollout"):
            ...
        metrics |= phases.metrics(rollout=num_tokens)

    The end of a phase waits for the device (the current one, unless given).  A phase entered again adds up.
    Beginning and end are signs of progress (progress.py).
    """

    def __init__(self, device: torch.device | None = None) -> None:
        self.device = torch.device("cuda" if torch.cuda.is_available() else "cpu") if device is None else device
        self.seconds: dict[str, float] = {}
        self._began = time.perf_counter()

    @contextlib.contextmanager
    def __call__(self, name: str) -> Iterator[None]:
        start = time.perf_counter()
        progress.entered(name)
        yield
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)
        progress.left(name)
        self.seconds[name] = self.seconds.get(name, 0.0) + time.perf_counter() - start

    def metrics(self, **tokens: float) -> dict[str, float]:
        """What was timed since the last call, which begins anew; this rank's clock, not equal on all ranks.

        seconds/PHASE; seconds/step, all of the time between the calls; tokens_per_second/PHASE for each
        ``PHASE=tokens`` (of the global batch, as a phase lasts equally long everywhere); memory/peak_gib,
        the most so far allocated on the device, or on CPU memory/rss_gib, resident in this process.
        """
        now = time.perf_counter()
        metrics = {f"seconds/{name}": seconds for name, seconds in self.seconds.items()}
        metrics["seconds/step"] = now - self._began
        for name, count in tokens.items():
            if self.seconds.get(name, 0.0) > 0:
                metrics[f"tokens_per_second/{name}"] = count / self.seconds[name]
        self.seconds, self._began = {}, now
        return metrics | _memory(self.device)


def _memory(device: torch.device) -> dict[str, float]:
    if device.type == "cuda":
        return {"memory/peak_gib": torch.cuda.max_memory_allocated(device) / 2**30}
    import psutil

    return {"memory/rss_gib": psutil.Process().memory_info().rss / 2**30}
