# Copyright (c) 2026 the megatron_selfdistill authors. Apache-2.0.
"""The phase of a step that is under way, as text, and the lines about phases that take long."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable
from dataclasses import dataclass, replace

from megatron_selfdistill.distributed import signs_of_life

LINE_SECONDS = 60.0
"""The seconds that a phase lasts before its first plain line, and the seconds between two plain lines."""
_FIRST_SECONDS, _TICK_SECONDS = 5.0, 0.5
BETWEEN_STEPS = ("checkpoint", "evaluation")
"""The phases that belong to the steps done, and to no step under way."""


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
        microbatch, of = signs_of_life.microbatch()
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


def duration(seconds: float) -> str:
    """Return a duration in minutes and seconds, with hours where there are any: ``5:15``, ``2:05:15``."""
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02d}:{rest:02d}" if hours else f"{minutes}:{rest:02d}"


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
