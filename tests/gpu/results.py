# Copyright (c) 2026 the megatron_selfdistill authors. Apache-2.0.
"""The outcomes of checks, which a stage prints, and appends to the file that SELFDISTILL_GPU_RESULTS names as JSON.

SELFDISTILL_GPU_DEADLINE is the time at which the stage is killed, in seconds of ``time.time``.
"""

from __future__ import annotations

import json
import math
import os
import sys
import time
import traceback
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path

VARIABLE = "SELFDISTILL_GPU_RESULTS"
DEADLINE = "SELFDISTILL_GPU_DEADLINE"
TO_REPORT_S = 5.0
"""Seconds that a stage keeps for the report of what it has not finished."""
OK, FAILED, SKIPPED = "ok", "FAILURE", "skipped"


@dataclass(frozen=True)
class Figure:
    """One number that a check has measured, with the bound that it must keep."""

    name: str
    value: float | None
    """The measured number; None if nothing was measured."""
    bound: float
    at_least: bool = False
    """Whether the bound is a lower bound: without so large a difference the check could not have failed."""
    where: str = ""
    """The case with the worst number."""

    @property
    def passed(self) -> bool:
        """Return whether the number keeps its bound; NaN and a number that was not measured do not."""
        if self.value is None:
            return False
        return self.value >= self.bound if self.at_least else self.value <= self.bound


@dataclass(frozen=True)
class Outcome:
    """The outcome of one check."""

    figures: tuple[Figure, ...] = ()
    not_done: str = ""
    """The reason why the check cannot run here; empty where it ran."""
    error: str = ""
    """The error that broke the check off; empty for none."""

    @property
    def passed(self) -> bool:
        """Whether the check has not failed; a check that cannot run here has not failed."""
        if self.error:
            return False
        return bool(self.not_done) or (bool(self.figures) and all(figure.passed for figure in self.figures))


def largest(name: str, values: dict[str, float], bound: float) -> Figure:
    """Return the largest value with the name of its case; NaN counts as the largest."""
    where = max(values, key=lambda case: math.inf if math.isnan(values[case]) else values[case])
    return Figure(name, values[where], bound, where=where)


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
    """Print the check's figures and append them to the file of results; return whether the check has not failed."""
    found = results_of(check, outcome)
    for one in found:
        value = "" if one.value is None else f"{one.value:.1e} {one.bound}"
        print(f"{check}: {' '.join(filter(None, (one.figure, value, one.verdict, one.note)))}", flush=True)
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


def all_held(checks: Mapping[str, Callable[[], Outcome]]) -> int:
    """Run all checks, also after a failure; return the exit status of their stage, which is 1 if a check has failed."""
    sound = [held(name, check) for name, check in checks.items()]
    return 0 if all(sound) else 1


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
