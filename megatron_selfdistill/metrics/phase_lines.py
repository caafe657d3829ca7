# Copyright (c) 2026 the megatron_selfdistill authors. Apache-2.0.
"""The lines about phases that take long."""

from __future__ import annotations

import contextlib
import sys
import threading
import time
from collections.abc import Callable, Iterator

from megatron_selfdistill.metrics.phase_progress import PhaseProgress
from megatron_selfdistill.metrics.phases import Phases

LINE_SECONDS = 60.0
"""The seconds that a phase lasts before its first plain line, and the seconds between two plain lines."""

_FIRST_SECONDS, _TICK_SECONDS = 5.0, 0.5


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
