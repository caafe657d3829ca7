# Copyright (c) 2026 the megatron_selfdistill authors. Apache-2.0.
"""The outcome of a check: figures with their bounds, over all ranks, as lines of a table."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace


@dataclass(frozen=True)
class Figure:
    """One number that a check has measured, with the bound that it must keep."""

    name: str
    value: float | None
    """The measured number; None on a rank that has nothing to measure."""
    bound: float
    at_least: bool = False
    """Whether the bound is a lower bound: without so large a difference the check could not have failed."""
    where: str = ""
    """The case with the worst number."""

    @property
    def passed(self) -> bool:
        """Return whether the number keeps its bound; NaN and a number that no rank has measured do not."""
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
    """The error that broke the check off, with its rank; empty for none."""
    name: str = ""
    seconds: float = 0.0

    @property
    def passed(self) -> bool:
        """Whether the check has not failed; a check that cannot run here has not failed."""
        if self.error:
            return False
        return bool(self.not_done) or (bool(self.figures) and all(figure.passed for figure in self.figures))

    @property
    def verdict(self) -> str:
        """The word of the table: ok, not done or FAILURE."""
        if not self.passed:
            return "FAILURE"
        return "not done" if self.not_done else "ok"


def largest(name: str, values: dict[str, float], bound: float) -> Figure:
    """Return the largest value with the name of its case; NaN counts as the largest."""
    where = max(values, key=lambda case: _badness(values[case], at_least=False))
    return Figure(name, values[where], bound, where=where)


def over_ranks(outcomes: Sequence[Outcome]) -> Outcome:
    """Return the outcomes of all ranks for one check as one outcome, with the worst of each figure."""
    first = outcomes[0]
    if len({(o.not_done, tuple(f.name for f in o.figures)) for o in outcomes}) > 1:
        listed = "; ".join(f"rank {r}: {o.not_done or len(o.figures)}" for r, o in enumerate(outcomes))
        return replace(first, error=f"the ranks do not agree about what can be done ({listed})")
    figures = tuple(_worst([o.figures[i] for o in outcomes]) for i in range(len(first.figures)))
    return replace(first, figures=figures, seconds=max(o.seconds for o in outcomes))


def _worst(figures: Sequence[Figure]) -> Figure:
    measured = [(figure.value, figure) for figure in figures if figure.value is not None]
    if not measured:
        return figures[0]
    return max(measured, key=lambda pair: _badness(pair[0], pair[1].at_least))[1]


def _badness(value: float, at_least: bool) -> float:
    if math.isnan(value):
        return math.inf
    return -value if at_least else value


HEADER = f"{'check':<58} {'figure':>9}    {'bound':>7} {'seconds':>8}  verdict"


def lines(outcome: Outcome) -> list[str]:
    """Return the lines of the table for a check: its figures, or why there are none."""
    rows = [f"{outcome.name:<58} {'':>9}    {'':>7} {outcome.seconds:>8.1f}  {outcome.verdict}"]
    if outcome.error:
        return [*rows, f"    -> {outcome.error}"]
    if outcome.not_done:
        return [*rows, f"    -> {outcome.not_done}"]
    for figure in outcome.figures:
        value = "none" if figure.value is None else f"{figure.value:.1e}"
        row = f"    {figure.name:<54} {value:>9} {'>=' if figure.at_least else '<='} {figure.bound:>7g}"
        rows.append(row if figure.passed else f"{row} {'':>8}  FAILURE{f' ({figure.where})' if figure.where else ''}")
    return rows
