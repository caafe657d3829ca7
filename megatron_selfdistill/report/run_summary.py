# Copyright (c) 2026 the megatron_selfdistill authors. Apache-2.0.
"""The first lines of a report: whether a run learns, whether it is healthy, and what has changed."""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import NamedTuple

from megatron_selfdistill.report.figures import GROUPS
from megatron_selfdistill.report.run_record import RunRecord
from megatron_selfdistill.report.sick_rules import FALL, FIRST, IN_A_ROW


class SummaryLine(NamedTuple):
    """One line about a run."""

    label: str
    text: str
    state: str
    """What the line says about the run: "good", "bad", or "open" for a line that does not judge, or not yet."""


ACCURACIES = {"evaluation/greedy_accuracy": "greedy", "evaluation/sampled_accuracy": "sampled"}
LOSSES = {"loss/mean": "loss", "loss/reverse_kl": "reverse KL"}
CHANGES = {"entropy/student": "entropy", "evaluation/greedy_mean_length": "length", "response/length_mean": "length"}


def summary(run: RunRecord) -> list[SummaryLine]:
    """Return the three lines of a run."""
    return [_learns(run), _is_healthy(run), _changed(run)]


def sick_figures(run: RunRecord) -> Iterator[tuple[str, int]]:
    """Yield the title of each figure that is sick by its own rule, with the step since which it is."""
    for figures in GROUPS.values():
        for figure in figures:
            since = figure.sick_since(run) if figure.present(run.metrics) else None
            if since is not None:
                yield figure.title, since


def _learns(run: RunRecord) -> SummaryLine:
    for key, kind in ACCURACIES.items():
        steps, values = _finite(run, key)
        if len(values) == 1:
            text = f"one evaluation so far: accuracy ({kind}) {values[0]:.3f} at step {steps[0]}"
            return SummaryLine("Learns?", text, "open")
        if values:
            first, last, best = values[0], values[-1], max(values)
            text = f"accuracy ({kind}) {first:.3f} → {last:.3f}, steps {steps[0]} to {steps[-1]}"
            if best > max(first, last) + FALL:
                text += f"; best {best:.3f} at step {steps[values.index(best)]}"
            if last > first + FALL:
                return SummaryLine("Learns", text, "good")
            return SummaryLine("Does not learn", text, "open" if last >= first - FALL else "bad")
    for key, name in LOSSES.items():
        steps, values = _finite(run, key)
        if values:
            text = f"no evaluation; {name} {values[0]:.3g} → {values[-1]:.3g}, steps {steps[0]} to {steps[-1]}"
            return SummaryLine("Learns?", text, "open")
    return SummaryLine("Learns?", "neither an evaluation nor a loss is logged", "open")


def _is_healthy(run: RunRecord) -> SummaryLine:
    spoken = [
        f"a guard stopped the run after step {event['step']}{_short_reason(event.get('reason'))}"
        for event in run.events
        if event["event"] == "guard"
    ]
    sick = [f"{title} (since step {since})" for title, since in sick_figures(run)]
    if spoken or sick:
        return SummaryLine("Sick", "; ".join(spoken + sick), "bad")
    num_steps = max((len(steps) for steps, _ in run.metrics.values()), default=0)
    if num_steps < FIRST + IN_A_ROW:
        text = f"no guard has spoken; too few steps for most rules, {num_steps} of {FIRST + IN_A_ROW}"
        return SummaryLine("Healthy?", text, "open")
    return SummaryLine("Healthy", "no guard has spoken, and no figure is sick", "good")


def _changed(run: RunRecord) -> SummaryLine:
    parts: dict[str, str] = {}
    for key, name in CHANGES.items():
        values = run.values(key)
        if values:
            parts.setdefault(name, f"{name} {values[0]:.3g} → {values[-1]:.3g}")
    return SummaryLine("Changed", ", ".join(parts.values()) or "neither entropy nor length is logged", "open")


def _short_reason(reason: object) -> str:
    """Return what a guard has found, in parentheses, without its advice."""
    return f" ({reason.partition(';')[0]})" if isinstance(reason, str) else ""


def _finite(run: RunRecord, key: str) -> tuple[list[int], list[float]]:
    steps, values = run.metrics.get(key, ([], []))
    return [step for step, value in zip(steps, values, strict=True) if math.isfinite(value)], run.values(key)
