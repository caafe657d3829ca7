# Copyright (c) 2026 the megatron_selfdistill authors. Apache-2.0.
"""Loggers that tests name by a dotted path: one that records its calls in a file, and three that fail."""

from __future__ import annotations

import json
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from megatron_selfdistill.metrics.loggers import LoggedRun
from megatron_selfdistill.metrics.samples import Sample

CALLS = "calls.jsonl"


class RecordedLogger:
    """A logger that appends each of its calls, as a list of the name and the arguments, to ``run_dir/CALLS``."""

    def __init__(self, run: LoggedRun) -> None:
        self.path = run.run_dir / CALLS
        self._record("init", run.step, run.config)

    def _record(self, *call: Any) -> None:
        with self.path.open("a") as file:
            file.write(json.dumps(call) + "\n")

    def add_scalars(self, step: int, metrics: Mapping[str, float]) -> None:
        self._record("scalars", step, dict(metrics))

    def add_samples(self, step: int, samples: Sequence[Sample]) -> None:
        self._record("samples", step, [sample.response for sample in samples])

    def close(self) -> None:
        self._record("close")


class FailingLogger(RecordedLogger):
    """A `RecordedLogger` that fails at step 2."""

    def add_scalars(self, step: int, metrics: Mapping[str, float]) -> None:
        if step == 2:
            raise ConnectionError("the server\nis gone")
        super().add_scalars(step, metrics)


class LeavingLogger(RecordedLogger):
    """A `RecordedLogger` that ends the program at step 2."""

    def add_scalars(self, step: int, metrics: Mapping[str, float]) -> None:
        if step == 2:
            sys.exit(0)
        super().add_scalars(step, metrics)


def failing_start(run: LoggedRun) -> RecordedLogger:
    raise ConnectionError("no answer")


def calls(run_dir: Path) -> list[list[Any]]:
    return [json.loads(line) for line in (run_dir / CALLS).read_text().splitlines()]
