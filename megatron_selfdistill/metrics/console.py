# Copyright (c) 2026 the megatron_selfdistill authors. Apache-2.0.
"""The console of a run: a line per step, samples, messages, and the remaining time."""

from __future__ import annotations

import time
from collections.abc import Mapping
from typing import Any

from megatron_selfdistill.config.command_line import LINE
from megatron_selfdistill.distributed.terminal import visible
from megatron_selfdistill.metrics.phase_progress import PhaseProgress, SlowPhaseLines, duration
from megatron_selfdistill.metrics.samples import Sample, console_text


class RunConsole:
    """The lines of a run on the console; a line per minute speaks of a phase that takes long."""

    def __init__(self, num_steps: int, every: int, output: Any) -> None:
        """``every``: the steps from a line to the next one; ``output``: a rich Console, or None for standard output."""
        from rich.console import Console

        self.num_steps, self.every = num_steps, every
        self.output = output if output is not None else Console()
        self.progress = PhaseProgress(num_steps)
        self.slow_phases = SlowPhaseLines(self.progress, self._print)
        self.pace = Pace(num_steps)
        self.explained = False

    def start(self, step: int) -> None:
        """Begin a launch after ``step`` steps."""
        self.pace = Pace(self.num_steps)
        self.progress.done = step
        self.slow_phases.start()

    def step(self, step: int, metrics: Mapping[str, float]) -> None:
        """Take note of the end of a step, and print its line if one is due; the first line explains the columns."""
        self.pace.advance(step)
        self.progress.done = step
        if step % self.every and step != self.num_steps:
            return
        columns = [column for column in LINE if column.key in metrics]
        if not self.explained:
            self.explained = True
            self._print("columns: " + "; ".join(f"{column.label} = {column.meaning}" for column in columns))
        left = f", {self.pace.left}" if self.pace.left else ""
        shown = [f"{column.label} {metrics[column.key]:{column.form}}" for column in columns]
        self._print("  ".join([f"step {step} of {self.num_steps}{left}:", *shown]))

    def sample(self, sample: Sample, heading: str) -> None:
        """Print a sample, with colours where the terminal has some."""
        coloured = self.output.is_terminal and self.output.color_system is not None and not self.output.no_color
        self._print(console_text(sample, heading, coloured=coloured))

    def print(self, text: str) -> None:
        """Print a line, in which control characters are visible."""
        self._print(visible(text))

    def close(self) -> None:
        """End the lines about slow phases."""
        self.slow_phases.close()

    def _print(self, text: Any) -> None:
        self.output.print(text, markup=False, highlight=False, soft_wrap=not self.output.is_terminal)


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
