# Copyright (c) 2026 the megatron_selfdistill authors. Apache-2.0.
"""A stage reports one line of JSON per figure, in the file that SELFDISTILL_GPU_RESULTS names, and a table row.

SELFDISTILL_GPU_DEADLINE is the time at which the stage is killed, in seconds of ``time.time``.
"""

from __future__ import annotations

import json
import os
import sys
import time
import traceback
from collections.abc import Callable
from dataclasses import asdict, dataclass, replace
from pathlib import Path

from tests.gpu.outcome import Outcome, lines

VARIABLE = "SELFDISTILL_GPU_RESULTS"
DEADLINE = "SELFDISTILL_GPU_DEADLINE"
TO_REPORT_S = 5.0
"""Seconds that a stage keeps for the report of what it has not finished."""
OK, FAILED, SKIPPED = "ok", "FAILURE", "skipped"


@dataclass(frozen=True)
class Result:
    """One figure of one check."""

    check: str
    figure: str
    value: float | None
    bound: str
    """With its sign: "<= 0.1"."""
    verdict: str
    """ok, FAILURE or skipped."""
    note: str = ""
    """Why the check was skipped or broken off, or in which of its cases the figure is worst."""


def results_of(check: str, outcome: Outcome) -> list[Result]:
    """Return one result per figure; one without a figure where the check was skipped or broken off."""
    if outcome.error:
        return [Result(check, "", None, "", FAILED, outcome.error)]
    if outcome.not_done:
        return [Result(check, "", None, "", SKIPPED, outcome.not_done)]
    if not outcome.figures:
        return [Result(check, "", None, "", FAILED, "the check has measured nothing")]
    return [
        Result(
            check,
            figure.name,
            figure.value,
            f"{'>=' if figure.at_least else '<='} {figure.bound:g}",
            OK if figure.passed else FAILED,
            "" if figure.passed else figure.where,
        )
        for figure in outcome.figures
    ]


def report(check: str, outcome: Outcome) -> bool:
    """Print the check's rows and append them to the file of results; return whether the check has not failed."""
    for line in lines(replace(outcome, name=check)):
        print(line, flush=True)
    found = results_of(check, outcome)
    if path := os.environ.get(VARIABLE):
        with Path(path).open("a") as file:
            file.writelines(json.dumps(asdict(result)) + "\n" for result in found)
    return all(result.verdict != FAILED for result in found)


def held(check: str, work: Callable[[], Outcome]) -> bool:
    """Run one check and report what it found, also where it raises; return whether it has not failed."""
    try:
        outcome = work()
    except Exception as error:
        traceback.print_exc(file=sys.stdout)
        outcome = Outcome(error=f"{type(error).__name__}: {' '.join(str(error).split())[:300]}")
    return report(check, outcome)


def seconds_left(without_deadline: float = 100.0) -> float:
    """Return the seconds that this stage may still work, without those for its report."""
    deadline = os.environ.get(DEADLINE)
    return without_deadline if deadline is None else float(deadline) - time.time() - TO_REPORT_S


def read(path: Path) -> list[Result]:
    """Return the results of a file; a last line that a killed process has cut short is skipped."""
    found = []
    for line in path.read_text().splitlines() if path.exists() else []:
        try:
            found.append(Result(**json.loads(line)))
        except ValueError:
            continue
    return found
