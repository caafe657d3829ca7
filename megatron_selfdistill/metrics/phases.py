# Copyright (c) 2026 the megatron_selfdistill authors. Apache-2.0.
"""The phases of a step: their seconds, tokens per second and memory, and what the console shows of them."""

from __future__ import annotations

import contextlib
import sys
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, replace
from typing import TypeAlias

import torch

from megatron_selfdistill.distributed import watchdog

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
    The beginning and the end of a phase are signs of progress (distributed/watchdog.py).  A listener hears of both at
    once, by the host's clock, and never waits for the device.
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
        watchdog.entered(name)
        listener = self.listener
        if listener is not None:
            listener.entered(name)
        try:
            yield
        finally:
            if listener is not None:
                listener.left()
        watchdog.left(name)
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


BETWEEN_STEPS = ("checkpoint", "evaluation")
"""The phases that belong to the steps done, and to no step under way."""
LINE_SECONDS = 60.0
"""The seconds that a phase lasts before its first plain line, and the seconds between two plain lines."""
_FIRST_SECONDS, _TICK_SECONDS = 5.0, 0.5


@dataclass(frozen=True)
class PhaseUnderWay:
    """A phase that has been entered and not left."""

    name: str
    began: float
    """The clock (`time.monotonic`) when the phase was entered."""
    finished: int = 0
    """The finished responses of the last call of a sampler."""
    total: int = 0
    """All responses of this call; 0 without a call."""
    whose: str = ""

    @property
    def text(self) -> str:
        """The phase, such as ``evaluation, 12 of 64 responses, 2:10`` or ``train, microbatch 3 of 8, 1:03``."""
        microbatch, of = watchdog.microbatch()
        count = f"microbatch {microbatch} of {of}" if of else ""
        count = f"{self.finished} of {self.total} responses {self.whose}".rstrip() if self.total else count
        return ", ".join(filter(None, [self.name, count, duration(time.monotonic() - self.began)]))


class PhaseProgress:
    """The phase under way on this rank, of which `Phases` informs this object.  Any thread may read."""

    def __init__(self, num_steps: int | None = None) -> None:
        """``num_steps``: the steps of the whole run; None for a command without steps."""
        self._num_steps = num_steps
        self._open: tuple[PhaseUnderWay, ...] = ()  # from the outermost phase to the innermost
        self.done = 0
        """The steps that are done."""

    def entered(self, name: str) -> None:
        """Record that the phase ``name`` begins."""
        self._open = (*self._open, PhaseUnderWay(name, time.monotonic()))

    def left(self) -> None:
        """Record that the phase entered last has ended, also where it raised."""
        self._open = self._open[:-1]

    def counted(self, finished: int, total: int, whose: str = "") -> None:
        """Record that ``finished`` of ``total`` responses are finished; does nothing outside of a phase.

        ``whose``: the part of the world that the responses belong to, such as ``of this replica``.
        """
        phase = self.now
        if phase is not None and total:
            self._open = (*self._open[:-1], replace(phase, finished=finished, total=total, whose=whose))

    @property
    def now(self) -> PhaseUnderWay | None:
        """The phase under way; None between two phases."""
        under_way = self._open  # one read, since another thread may replace it
        return under_way[-1] if under_way else None

    @property
    def place(self) -> str:
        """The step of the phase under way, as the beginning of a line: ``step 3: ``, ``after step 3: `` between two."""
        phase = self.now
        if self._num_steps is None:
            return ""
        if self.done == self._num_steps or (phase is not None and phase.name in BETWEEN_STEPS):
            return f"after step {self.done}: "
        return f"step {self.done + 1}: "


class SlowPhaseLines:
    """The thread that shows a plain line about a phase that takes long, such as ``step 3: rollout, 12 of 64 ..``.

    There is at most one line per `LINE_SECONDS`; with ``at_once`` a phase has a line when it begins, and lines at
    distances that grow to `LINE_SECONDS`.
    """

    def __init__(self, progress: PhaseProgress, show: Callable[[str], None], *, at_once: bool = False) -> None:
        """``show``: prints one line; the thread calls it, so it must be safe beside the main thread."""
        self._progress, self._show, self._at_once = progress, show, at_once
        self._last = 0.0  # clock of the last line
        self._closing = threading.Event()
        self._thread: threading.Thread | None = None
        self._one_at_a_time = threading.Lock()

    def start(self) -> None:
        """Start the thread; a second call does nothing."""
        if self._thread is None:
            self._thread = threading.Thread(target=self._run, name="slow phases", daemon=True)
            self._thread.start()

    def tick(self) -> None:
        """Show a line where it is time for one."""
        with self._one_at_a_time:
            phase, now = self._progress.now, time.monotonic()
            if phase is None:
                return
            distance, age = LINE_SECONDS, self._last - phase.began  # the age at the last line; below 0 without one
            if self._at_once:
                distance = 0.0 if age < 0 else min(distance, max(age, _FIRST_SECONDS))
            if now - max(phase.began, self._last) >= distance:
                self._last = now
                self._show(f"{self._progress.place}{phase.text}")

    def close(self) -> None:
        """End the thread; a second call does nothing."""
        self._closing.set()
        if self._thread is not None:
            self._thread.join()

    def _run(self) -> None:
        while not self._closing.wait(_TICK_SECONDS):
            try:
                self.tick()
            except OSError:  # standard output is gone, and the next line of the main thread raises the same error
                return


@contextlib.contextmanager
def phases_shown(phases: Phases, *, enabled: bool) -> Iterator[None]:
    """Show ``phases`` of a command by lines on standard error; ``enabled``: False if this rank shows nothing."""
    if not enabled:
        yield
        return
    phases.listener = progress = PhaseProgress()
    lines = SlowPhaseLines(progress, lambda line: print(line, file=sys.stderr, flush=True), at_once=True)
    lines.start()
    try:
        yield
    finally:
        lines.close()


class Pace:
    """The speed of a launch without its first step, which allocates memory and compiles."""

    def __init__(self, num_steps: int) -> None:
        """Start the clock for a run of ``num_steps`` steps in all."""
        self.num_steps = num_steps
        self._warm: tuple[int, float] | None = None  # (steps done, clock) after the first step of this launch
        self._now = (0, 0.0)

    def advance(self, done: int) -> None:
        """Record that ``done`` steps of the run are complete."""
        self._now = (done, time.monotonic())
        self._warm = self._warm or self._now

    @property
    def left(self) -> str:
        """Return the time until the last step, such as ``5:15 left`` or ``2:05:15 left``; empty before the third step.

        The estimate is the mean of all steps of the launch except the first one.
        """
        done, now = self._now
        if self._warm is None or done < self._warm[0] + 2:
            return ""
        seconds_per_step = (now - self._warm[1]) / (done - self._warm[0])
        return f"{duration(seconds_per_step * (self.num_steps - done))} left"


def duration(seconds: float) -> str:
    """Return a duration in minutes and seconds, with hours where there are any: ``5:15``, ``2:05:15``."""
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02d}:{rest:02d}" if hours else f"{minutes}:{rest:02d}"


def overlap_metrics(metrics: Mapping[str, float]) -> dict[str, float]:
    """Return the metrics of a step whose responses come from servers.

    ``metrics`` holds seconds/step, rollout/generation_seconds (in which the servers worked on requests, also on those
    of later steps) and rollout/waited_seconds (in which the trainer waited for responses).
    """
    generation, step = metrics["rollout/generation_seconds"], metrics["seconds/step"]
    return {
        "overlap/share": max(generation - metrics["rollout/waited_seconds"], 0.0) / step,
        "rollout/servers_waited_seconds": max(step - generation, 0.0),
    }
