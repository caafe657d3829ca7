# Copyright (c) 2026 the megatron_selfdistill authors. Apache-2.0.
"""The estimate of the remaining time of a run, from the duration of its steps so far, and durations as text."""

from __future__ import annotations

import time


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
