# Copyright (c) 2026 the megatron_selfdistill authors. Apache-2.0.
"""Where the metrics of a run go: metrics.jsonl, TensorBoard, and console lines above a progress bar."""

from __future__ import annotations

import json
import math
import os
import time
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

METRICS_FILE = "metrics.jsonl"

# Key, label and format of what a console line shows, where the step has it.
_LINE = (
    ("loss/mean", "loss", ".4f"),
    ("entropy/student", "entropy", ".4f"),
    ("k/mean", "k", ".2f"),
    ("top1_agreement", "top-1", ".3f"),
    ("response/length_mean", "length", ".1f"),
    ("response/truncated_share", "cut", ".2f"),
    ("gradient_norm", "grad", ".3g"),
    ("learning_rate", "lr", ".2g"),
    ("seconds/step", "s", ".2f"),
)


class MetricsLog:
    """Writes the metrics of a run.  A step is named by the steps that are done after it: the first is step 1.
    Call `resume` first, with the steps that are done: 0 for a new run.

    metrics.jsonl has one object per call of `log` or `log_evaluation`, ``{"step": 3, "loss/mean": 0.07}``,
    handed to the operating system at once.  JSON has no NaN and no infinities: they are the strings "NaN",
    "Infinity" and "-Infinity", which `read_metrics` turns back. ``console``: a progress bar with the time
    left, and a line every ``console_every`` steps; the lines alone where the output is no terminal.
    ``output``: a rich Console other than that of standard output. ``enabled`` (``grid.is_reporter``): where
    False, nothing is read, written or printed.
    """

    def __init__(
        self,
        run_dir: str | Path,
        *,
        num_steps: int,
        tensorboard: bool = True,
        console: bool = True,
        console_every: int = 1,
        enabled: bool = True,
        output: Any = None,
    ) -> None:
        self.path, self.num_steps, self.console_every = Path(run_dir) / METRICS_FILE, num_steps, console_every
        self.enabled, self._tensorboard = enabled, tensorboard
        self._file: Any = None
        self._writer: Any = None
        self._console = _Console(num_steps, output) if console and enabled else None

    def resume(self, step: int) -> None:
        """Drop what was logged after ``step`` steps were done (for 0, everything), then open the files.

        A run that is killed after it logged and before it saved a checkpoint runs those steps once more.  The
        file is replaced as a whole: being killed here loses nothing.
        """
        if not self.enabled:
            return
        self.path.parent.mkdir(parents=True, exist_ok=True)
        kept = [line for line, values in _complete_lines(self.path) if step and values["step"] <= step]
        temporary = self.path.with_suffix(".tmp")
        temporary.write_text("".join(kept), encoding="utf-8")
        os.replace(temporary, self.path)
        self._file = self.path.open("a", encoding="utf-8")
        if self._tensorboard:
            from torch.utils.tensorboard import SummaryWriter  # takes a second to import

            folder = str(self.path.parent / "tensorboard")
            self._writer = SummaryWriter(folder, purge_step=step + 1 if step else 0, flush_secs=10)
        if self._console is not None:
            self._console.start(step)

    def log(self, step: int, metrics: Mapping[str, float]) -> None:
        """The metrics of the step that has just run, after which ``step`` are done."""
        if not self.enabled:
            return
        self._write(step, metrics)
        if self._console is not None:
            self._console.advance(step)
            if step % self.console_every == 0 or step == self.num_steps:
                shown = [f"{label} {metrics[key]:{form}}" for key, label, form in _LINE if key in metrics]
                self._console.step_line(step, "  ".join(shown))

    def log_evaluation(self, step: int, metrics: Mapping[str, float]) -> None:
        """Metrics taken when ``step`` steps are done; always a line on the console, with the accuracies (of k > 1
        for pass@k), or with all of them where there is no accuracy."""
        if not self.enabled:
            return
        self._write(step, metrics)
        accuracies = [k for k in metrics if k.endswith("_accuracy") or ("/pass_at_" in k and not k.endswith("_at_1"))]
        self.message(f"step {step}: " + ", ".join(f"{key} {metrics[key]:.4g}" for key in accuracies or metrics))

    def message(self, text: str) -> None:
        """A line on the console, above the progress bar."""
        if self._console is not None:
            self._console.print(text)

    def close(self) -> None:
        """Close the files and leave the terminal as it was; may be called twice."""
        for part in (self._file, self._writer, self._console):
            if part is not None:
                part.close()
        self._file = self._writer = self._console = None

    def __enter__(self) -> MetricsLog:
        return self

    def __exit__(self, *error: object) -> None:
        self.close()

    def _write(self, step: int, metrics: Mapping[str, float]) -> None:
        if self._file is None:
            raise RuntimeError("MetricsLog: expected resume(step) before the first log, got none; call it.")
        values = {key: _json_number(float(value)) for key, value in metrics.items()}
        self._file.write(json.dumps({"step": step, **values}, allow_nan=False) + "\n")
        self._file.flush()
        if self._writer is not None:
            for key, value in metrics.items():
                self._writer.add_scalar(key, float(value), step)


def read_metrics(run_dir: str | Path) -> list[dict[str, float]]:
    """The lines of a run's metrics.jsonl, in order, as numbers; one that a kill cut short is left out."""
    return [values for _, values in _complete_lines(Path(run_dir) / METRICS_FILE)]


def _complete_lines(path: Path) -> Iterator[tuple[str, dict[str, float]]]:
    if not path.exists():
        return
    for line in path.read_text(encoding="utf-8").splitlines(keepends=True):
        try:
            values = json.loads(line)
        except ValueError:
            continue
        if line.endswith("\n"):
            yield line, {key: float(v) if isinstance(v, str) else v for key, v in values.items()}


def _json_number(value: float) -> float | str:
    if math.isfinite(value):
        return value
    return "NaN" if math.isnan(value) else "Infinity" if value > 0 else "-Infinity"


class _Console:
    """A progress bar where the output is a terminal; plain lines that tell the time left where it is not."""

    def __init__(self, num_steps: int, output: Any) -> None:
        from rich.console import Console
        from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

        self.num_steps = num_steps
        self.output = output if output is not None else Console()
        columns = (TextColumn("step"), MofNCompleteColumn(), BarColumn(), TimeRemainingColumn())
        # By default the speed is that of the last 30 s, in which a large model may not do two steps.
        self.bar = Progress(*columns, console=self.output, speed_estimate_period=1800.0)
        self.task = self.bar.add_task("", total=num_steps)
        self.first = self.done = 0
        self.began = time.monotonic()

    def start(self, step: int) -> None:
        self.first = self.done = step
        self.began = time.monotonic()
        self.bar.reset(self.task, completed=step)
        if self.output.is_terminal:
            self.bar.start()

    def advance(self, completed: int) -> None:
        self.done = completed
        self.bar.update(self.task, completed=completed)

    def step_line(self, step: int, text: str) -> None:
        place = f"step {step}"
        if not self.output.is_terminal:
            seconds = (time.monotonic() - self.began) / max(self.done - self.first, 1)
            minutes, seconds = divmod(round(seconds * (self.num_steps - self.done)), 60)
            place = f"step {step} of {self.num_steps}, {minutes}:{seconds:02d} left:"
        self.print(f"{place}  {text}")

    def print(self, text: str) -> None:
        self.output.print(text, markup=False, highlight=False, soft_wrap=not self.output.is_terminal)

    def close(self) -> None:
        if self.output.is_terminal:
            self.bar.stop()
