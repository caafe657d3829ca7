# Copyright (c) 2026 the megatron_selfdistill authors. Apache-2.0.
"""The log files of a run directory: their names, their readers, and the log of events.  Nothing here needs torch."""

from __future__ import annotations

import json
import logging
import math
import os
from collections.abc import Iterator
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

logger = logging.getLogger(__name__)

METRICS_FILE, SAMPLES_FILE = "metrics.jsonl", "samples.jsonl"
EVALUATION_SAMPLES_FILE, EVENTS_FILE = "evaluation_samples.jsonl", "events.jsonl"
REPORT_FILE = "report.html"

_LARGEST_STEP = 2**53
"""No step reaches this number, from which on JSON's readers round integers."""


def read_metrics(run_dir: str | Path) -> list[dict[str, float]]:
    """Return the lines of a run's metrics.jsonl in order, as numbers; see `records` for lines that are skipped."""
    lines = (record for _, record in records(Path(run_dir) / METRICS_FILE))
    # float also takes "NaN" and "Infinity"
    return [{"step": line.pop("step")} | {key: float(value) for key, value in line.items()} for line in lines]


def read_samples(run_dir: str | Path) -> list[dict[str, Any]]:
    """Return the lines of a run's samples.jsonl in order; see `records` for lines that are skipped."""
    return [record for _, record in records(Path(run_dir) / SAMPLES_FILE)]


def read_evaluation_samples(run_dir: str | Path) -> list[dict[str, Any]]:
    """Return the lines of a run's evaluation_samples.jsonl in order; see `records` for lines that are skipped."""
    return [record for _, record in records(Path(run_dir) / EVALUATION_SAMPLES_FILE)]


def read_events(run_dir: str | Path) -> list[dict[str, Any]]:
    """Return the lines of a run's events.jsonl in order, over all launches; see `EventLog` and `records`."""
    return [record for _, record in records(Path(run_dir) / EVENTS_FILE)]


def records(path: Path) -> Iterator[tuple[bytes, dict[str, Any]]]:
    """Yield (line, record) for each complete line of a file of JSON lines that is an object with a step.

    A file that is not there, or is no regular file, has no records.  Whatever else stands in the file stops nobody: the
    function skips it, and then logs one warning with the file, the number of skipped lines and the first of them.  A
    last line that a kill cut short, and empty lines, are no reason for a warning.
    """
    if not path.is_file():  # a named pipe would make the reader wait for ever
        return
    first, skipped = "", 0
    with path.open("rb") as file:
        for number, line in enumerate(file, 1):
            if not line.endswith(b"\n") or not line.strip():
                continue
            try:
                record = json_object(line)
                if type(step := record.get("step")) is not int or not 0 <= step < _LARGEST_STEP:
                    raise ValueError("has no step, an integer from 0 on")
            except ValueError as error:
                first, skipped = first or f"line {number}, which {error}", skipped + 1
            else:
                yield line, record
    if skipped:
        lines = "1 line was" if skipped == 1 else f"{skipped} lines were"
        logger.warning("%s: %s skipped, the first: %s", path, lines, first)


def json_object(line: bytes) -> dict[str, Any]:
    """Return the object of a line of JSON.  Raises: ValueError with the end of a sentence about the line."""
    try:
        value = json.loads(line.decode("utf-8"))
    except (ValueError, RecursionError) as error:
        raise ValueError(f"is not JSON in UTF-8 ({type(error).__name__})") from None
    if not isinstance(value, dict):
        raise ValueError("is not an object")
    return value


def finite(value: Any) -> float | None:
    """Return ``value``, a value of JSON, as a finite number; None for everything else."""
    is_number = isinstance(value, int | float) and not isinstance(value, bool)
    return float(value) if is_number and math.isfinite(value) else None


def shortened(text: str, length: int = 40) -> str:
    """Return at most ``length`` characters of a foreign text, for a message; all of them can be printed."""
    return repr(text if len(text) <= length else text[:length] + "...")[1:-1]


class EventLog:
    """The log of what happens to a run besides its steps: events.jsonl in the run directory.

    A line has ``time`` (UTC, ISO 8601), ``step`` (the steps that are done), ``event`` and details.  The events are
    ``started`` (with the facts of the launch), ``saved``, ``stopped`` (on request), ``guard``, ``engine`` and
    ``verifier`` (why the run ended), and ``finished``.  A resumed run appends to the file: unlike metrics, events of
    steps that the run repeats stay.

    ``enabled``: False if this rank writes nothing.
    """

    def __init__(self, run_dir: str | Path, *, enabled: bool = True) -> None:
        self.path, self.enabled = Path(run_dir) / EVENTS_FILE, enabled

    def record(self, step: int, event: str, **details: Any) -> None:
        """Append one event; ``details``: JSON values.  An event that cannot be written becomes a warning."""
        if not self.enabled:
            return
        line = {"time": datetime.now(UTC).isoformat(timespec="seconds"), "step": step, "event": event, **details}
        try:
            with self.path.open("a+b") as file:
                file.seek(max(0, file.seek(0, os.SEEK_END) - 1))
                cut_short = file.read() not in (b"", b"\n")  # by a kill
                file.write(b"\n" * cut_short + json.dumps(line).encode() + b"\n")
        except OSError as error:
            logger.warning("the event %s of step %d is not in %s: %s", event, step, self.path, error)


def replace_file(path: Path, content: str | bytes) -> None:
    """Write ``content``, a text in UTF-8, to ``path`` in one move: a kill leaves the file that was there before.

    Raises: OSError if the file cannot be written.
    """
    temporary = path.with_name(f".{path.name}.{os.getpid()}")
    try:
        temporary.write_bytes(content.encode("utf-8") if isinstance(content, str) else content)
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)
