# Copyright (c) 2026 the megatron_selfdistill authors. Apache-2.0.
"""The phase that a run is in: the end of the live line on a terminal, and plain lines about slow phases elsewhere."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

from megatron_selfdistill.metrics.pace import duration

if TYPE_CHECKING:
    from rich.text import Text

BETWEEN_STEPS = ("checkpoint", "evaluation")
"""The phases that belong to the steps done, and to no step under way."""
LINE_SECONDS = 60.0
"""The seconds that a phase lasts before its first plain line, and the seconds between two plain lines."""
_TICK_SECONDS = 5.0


@dataclass(frozen=True)
class PhaseUnderWay:
    """A phase that has been entered and not left."""

    name: str
    began: float
    """The clock (`time.monotonic`) when the phase was entered."""
    count: str = ""
    """How many responses are finished, such as ``12 of 64 responses``; empty where nothing is counted."""


class PhaseProgress:
    """The phase under way on this rank, as a `PhaseListener`.

    Any thread may read.  As a rich renderable, the object is its `text`.
    """

    def __init__(self, num_steps: int) -> None:
        """``num_steps``: the steps of the whole run."""
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
            count = f"{finished} of {total} responses {whose}".rstrip()
            self._open = (*self._open[:-1], replace(phase, count=count))

    @property
    def now(self) -> PhaseUnderWay | None:
        """The phase under way; None between two phases."""
        under_way = self._open  # one read, since another thread may replace it
        return under_way[-1] if under_way else None

    @property
    def text(self) -> str:
        """The phase under way, such as ``rollout, 12 of 64 responses, 2:10``; empty between two phases."""
        phase = self.now
        if phase is None:
            return ""
        return ", ".join(filter(None, [phase.name, phase.count, duration(time.monotonic() - phase.began)]))

    @property
    def place(self) -> str:
        """The step to which the phase under way belongs, such as ``step 3``, or ``after step 3`` between two steps."""
        phase = self.now
        if self.done == self._num_steps or (phase is not None and phase.name in BETWEEN_STEPS):
            return f"after step {self.done}"
        return f"step {self.done + 1}"

    def __rich__(self) -> Text:
        from rich.text import Text

        return Text(self.text, no_wrap=True, overflow="ellipsis")


class SlowPhaseLines:
    """The thread that shows a plain line about a phase that takes long, at most one line per `LINE_SECONDS`.

    A line is such as ``step 3: rollout, 12 of 64 responses, 2:10``.
    """

    def __init__(self, progress: PhaseProgress, show: Callable[[str], None]) -> None:
        """``show``: prints one line; the thread calls it, so it must be safe beside the main thread."""
        self._progress, self._show = progress, show
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
        """Show a line where the phase under way and the last line are both `LINE_SECONDS` old."""
        with self._one_at_a_time:
            phase, now = self._progress.now, time.monotonic()
            if phase is not None and now - max(phase.began, self._last) >= LINE_SECONDS:
                self._last = now
                self._show(f"{self._progress.place}: {self._progress.text}")

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
