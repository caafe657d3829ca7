# Copyright (c) 2026 the megatron_selfdistill authors. Apache-2.0.
"""Run the trainer in this process, and return what its steps measured."""

from __future__ import annotations

import json
import sys
from collections.abc import Sequence
from pathlib import Path


def measured_steps(run_dir: Path, overrides: Sequence[str], skipped: int) -> list[dict[str, float]]:
    """Train with ``overrides`` in ``run_dir``, and return the metrics of all steps but the first ``skipped`` ones.

    A run that fails ends the process with the exit status of the run.
    """
    from megatron_selfdistill.train import main as train

    status = train([*overrides, f"run_dir={run_dir}"])
    if status:
        sys.exit(status)
    return [json.loads(line) for line in (run_dir / "metrics.jsonl").read_text().splitlines()][skipped:]
