# Copyright (c) 2026 the megatron_selfdistill authors. Apache-2.0.
"""The log of a run's metrics and samples: JSON lines, the loggers, and lines on the console."""

from __future__ import annotations

import json
import logging
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from megatron_selfdistill.config import Config
from megatron_selfdistill.metrics.console import RunConsole
from megatron_selfdistill.metrics.loggers import LoggedRun, Loggers
from megatron_selfdistill.metrics.phases import Phases
from megatron_selfdistill.metrics.run_log import (
    EVALUATION_SAMPLES_FILE,
    METRICS_FILE,
    SAMPLES_FILE,
    records,
    replace_file,
)
from megatron_selfdistill.metrics.samples import Sample

logger = logging.getLogger(__name__)


class MetricsLog:
    """The log of a run, which writes metrics and samples.

    The first step is step 1.  Call `resume` first, with the number of steps that are done: 0 for a new run.

    metrics.jsonl has one object per call of `log` or `log_evaluation`, ``{"step": 3, "loss/mean": 0.07}``, handed to
    the operating system at once.  JSON has no NaN and no infinities: the log has the strings "NaN", "Infinity" and
    "-Infinity", which `read_metrics` converts back.  samples.jsonl has `Sample.record` of each sample, with the step.

    ``loggers``: the names of the loggers (metrics.loggers), which `resume` starts; they get ``config``, the
    configuration as config.yaml has it, once, and everything that is logged.

    The console has a line every ``console_every`` steps with the remaining time, and one per minute about a slow phase
    (`show_phases`).  If ``console_every`` is 0, the log prints nothing.  ``output``: a rich Console that replaces
    standard output.  ``enabled`` (``grid.is_reporter``): False if this rank reads, writes and prints nothing.
    """

    def __init__(
        self,
        run_dir: str | Path,
        *,
        num_steps: int,
        loggers: Sequence[str] = (),
        config: Mapping[str, Any] | None = None,
        console_every: int = 1,
        enabled: bool = True,
        output: Any = None,
    ) -> None:
        self.path = Path(run_dir) / METRICS_FILE
        self.samples_path = Path(run_dir) / SAMPLES_FILE
        self.evaluation_samples_path = Path(run_dir) / EVALUATION_SAMPLES_FILE
        self.enabled, self._logger_names, self._config = enabled, loggers, config or {}
        self._loggers: Loggers | None = None
        self._console = RunConsole(num_steps, console_every, output) if console_every and enabled else None

    def show_phases(self, phases: Phases) -> None:
        """Show from now on the phases of this rank on the console, where this rank has a console."""
        if self._console is not None:
            phases.listener = self._console.progress

    def resume(self, step: int) -> None:
        """Drop the log of all steps after ``step`` (for 0, the whole log), then open the files and start the loggers.

        A run that is killed after a log line and before the next checkpoint repeats these steps.  The function replaces
        the file in one move, so a kill at this point loses nothing.
        Raises: `ConfigError` if a logger of a new run cannot start (`Loggers`).
        """
        if not self.enabled:
            return
        self.path.parent.mkdir(parents=True, exist_ok=True)
        for path in (self.path, self.samples_path, self.evaluation_samples_path):
            if path == self.path or path.exists():
                _forget_after(step, path)
        if self._logger_names:
            self._loggers = Loggers(self._logger_names, LoggedRun(self.path.parent, step, self._config))
        if self._console is not None:
            self._console.start(step)

    def log(self, step: int, metrics: Mapping[str, float]) -> None:
        """Log the metrics of the step that has just ended, after which ``step`` steps are done."""
        if not self.enabled:
            return
        self._write(step, metrics)
        if self._console is not None:
            self._console.step(step, metrics)

    def log_evaluation(self, step: int, metrics: Mapping[str, float]) -> None:
        """Log the metrics of an evaluation after ``step`` steps, with one line on the console.

        The line shows the accuracies, pass@k for k > 1 and the rewards; without an accuracy it shows all metrics.
        """
        if not self.enabled:
            return
        self._write(step, metrics)
        shown = ("_accuracy", "_mean_reward")
        accuracies = [k for k in metrics if k.endswith(shown) or ("/pass_at_" in k and not k.endswith("_at_1"))]
        self.message(f"step {step}: " + ", ".join(f"{key} {metrics[key]:.4g}" for key in accuracies or metrics))

    def log_samples(self, step: int, make: Callable[[], Sequence[Sample]] | None) -> None:
        """Show and save samples of the step after which ``step`` steps are done; only the reporter calls ``make``.

        None shows nothing.  The file has all turns of a sample, while console and loggers show its first one.
        A sample never stops a run: an error in ``make`` or while writing becomes a warning of one line.
        """
        if not self.enabled or make is None:
            return
        try:
            samples = make()
            _append(self.samples_path, step, [sample.record() for sample in samples])
            shown = [one for i, one in enumerate(samples) if i == 0 or not one.continues(samples[i - 1])]
            if self._loggers is not None:
                self._loggers.add_samples(step, shown)
            if self._console is not None:
                for number, sample in enumerate(shown, 1):
                    self._console.sample(sample, f"step {step}, sample {number} of {len(shown)}")
        except Exception as error:
            self.warn(f"the samples of step {step} are not shown: {type(error).__name__}: {error}")

    def log_evaluation_samples(self, step: int, records: Sequence[Mapping[str, Any]]) -> None:
        """Save responses of the evaluation after ``step`` steps, one JSON object each."""
        if self.enabled and records:
            _append(self.evaluation_samples_path, step, records)

    def message(self, text: str) -> None:
        """Print a line on the console."""
        if self._console is not None:
            self._console.print(text)

    def warn(self, warning: str) -> None:
        """Print a warning on the console, and log it where this rank has no console."""
        if self._console is None:
            logger.warning("%s", warning)
        self.message(f"warning: {warning}")

    def close(self) -> None:
        """End the lines about slow phases and the loggers; a second call does nothing.

        A logger that cannot be closed becomes a warning.
        """
        if self._console is not None:
            self._console.close()
        self._console = None
        if self._loggers is not None:
            self._loggers.close()  # may print, and may wait for a server

    def _write(self, step: int, metrics: Mapping[str, float]) -> None:
        _append(self.path, step, [{key: _json_number(float(value)) for key, value in metrics.items()}])
        if self._loggers is not None:
            self._loggers.add_scalars(step, metrics)


def _append(path: Path, step: int, records: Sequence[Mapping[str, Any]]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)  # somebody may have deleted the directory
    with path.open("a", encoding="utf-8") as lines:
        lines.writelines(json.dumps({"step": step, **record}, allow_nan=False) + "\n" for record in records)


def configured_log(config: Config, phases: Phases, *, enabled: bool) -> MetricsLog:
    """Return the log of a run in its directory, which shows ``phases``; ``enabled`` as for `MetricsLog`."""
    log = MetricsLog(
        config.run_dir,
        num_steps=config.num_steps,
        loggers=config.metrics.loggers,
        config=asdict(config),
        console_every=config.metrics.console_every,
        enabled=enabled,
    )
    log.show_phases(phases)
    return log


def _forget_after(step: int, path: Path) -> None:
    """Drop the lines of steps after ``step`` (for 0, all lines) from a file, and replace the file in one move.

    Lines without a step, which `records` skips, are dropped, too.
    """
    kept = [line for line, record in records(path) if record["step"] <= step] if step else []
    replace_file(path, b"".join(kept))


def _json_number(value: float) -> float | str:
    if math.isfinite(value):
        return value
    return "NaN" if math.isnan(value) else "Infinity" if value > 0 else "-Infinity"
