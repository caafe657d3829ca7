# Copyright (c) 2026 the megatron_selfdistill authors. Apache-2.0.
"""The log files of a run directory: their names, their readers, and the log of events.  Nothing here needs torch."""

from __future__ import annotations

import json
import logging
import os
from collections.abc import Iterator
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from megatron_selfdistill.hidden_values import hidden

logger = logging.getLogger(__name__)

METRICS_FILE, SAMPLES_FILE = "metrics.jsonl", "samples.jsonl"
EVALUATION_SAMPLES_FILE, EVENTS_FILE = "evaluation_samples.jsonl", "events.jsonl"
REPORT_FILE = "report.html"


def read_metrics(run_dir: str | Path) -> list[dict[str, float]]:
    """Return the lines of a run's metrics.jsonl in order, as numbers, without a last line that a kill cut short."""
    return list(each_metrics(run_dir))


def each_metrics(run_dir: str | Path) -> Iterator[dict[str, float]]:
    """Yield what `read_metrics` returns, one line at a time."""
    for _, values in complete_lines(Path(run_dir) / METRICS_FILE):
        yield {key: float(value) for key, value in values.items()} | {"step": values["step"]}


def read_samples(run_dir: str | Path) -> list[dict[str, Any]]:
    """Return the lines of a run's samples.jsonl in order, without a last line that a kill cut short."""
    return [values for _, values in complete_lines(Path(run_dir) / SAMPLES_FILE)]


def read_evaluation_samples(run_dir: str | Path) -> list[dict[str, Any]]:
    """Return the lines of a run's evaluation_samples.jsonl in order, without a last line that a kill cut short."""
    return [values for _, values in complete_lines(Path(run_dir) / EVALUATION_SAMPLES_FILE)]


def read_events(run_dir: str | Path) -> list[dict[str, Any]]:
    """Return the lines of a run's events.jsonl in order, over all launches; see `EventLog`."""
    return [values for _, values in complete_lines(Path(run_dir) / EVENTS_FILE)]


def complete_lines(path: Path) -> Iterator[tuple[str, dict[str, Any]]]:
    """Yield (line, value) for each complete line of a file of JSON lines; nothing without the file."""
    if not path.exists():
        return
    with path.open(encoding="utf-8") as file:
        for line in file:
            try:
                values = json.loads(line)
            except ValueError:
                continue
            if line.endswith("\n"):
                yield line, values


class EventLog:
    """The log of what happens to a run besides its steps: events.jsonl in the run directory.

    A line has ``time`` (UTC, ISO 8601), ``step`` (the steps that are done), ``event`` and details.  The events are
    ``started`` (with the facts of the launch), ``saved``, ``stopped`` (on request), ``guard`` and ``engine`` (why the
    run ended), and ``finished``.  A resumed run appends to the file: unlike metrics, events of steps that the run
    repeats stay.  Details hide values that come from the environment.

    ``enabled``: False if this rank writes nothing.
    """

    def __init__(self, run_dir: str | Path, *, enabled: bool = True) -> None:
        self.path, self.enabled = Path(run_dir) / EVENTS_FILE, enabled

    def record(self, step: int, event: str, **details: Any) -> None:
        """Append one event; ``details``: JSON values.  An event that cannot be written becomes a warning."""
        if not self.enabled:
            return
        now = datetime.now(UTC).isoformat(timespec="seconds")
        line = {"time": now, "step": step, "event": event, **_hidden(details)}
        try:
            with self.path.open("a+b") as file:
                file.seek(max(0, file.seek(0, os.SEEK_END) - 1))
                cut_short = file.read() not in (b"", b"\n")  # by a kill
                file.write(b"\n" * cut_short + json.dumps(line).encode() + b"\n")
        except OSError as error:
            logger.warning("the event %s of step %d is not in %s: %s", event, step, hidden(str(self.path)), error)


def _hidden(value: Any) -> Any:
    if isinstance(value, str):
        return hidden(value)
    if isinstance(value, dict):
        return {key: _hidden(inner) for key, inner in value.items()}
    return [_hidden(inner) for inner in value] if isinstance(value, list | tuple) else value
