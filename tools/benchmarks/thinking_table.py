# Copyright (c) 2026 the megatron_selfdistill authors. Apache-2.0.
"""The table of an experiment on choosing_subtraction.py: accuracy by budget, attempts, forks, and what an arm lost."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from statistics import mean
from typing import Any

COLUMNS = {
    "within_1": "one attempt",
    "within_2": "two attempts",
    "within_3": "three attempts",
    "greedy": "greedy",
    "attempts": "attempts",
    "overlooked": "overlooked",
    "fork_entropy": "entropy on forks",
}
"""Figure of a line -> heading of its column."""
KEPT = ("attempts", "fork_entropy", "within_3")
"""The figures of which an arm must keep `SHARE` of the best arm, the base included."""
SHARE = 0.9
Line = Mapping[str, Any]


def thinking_table(
    lines: Sequence[Line], names: Mapping[str, str], spread: Callable[[Sequence[float]], str]
) -> list[str]:
    """Return a row for each arm: all figures after the last step, and the figures that the arm lost.

    An arm has lost a figure of `KEPT` whose mean over the seeds is below `SHARE` of the best mean.  ``lines`` hold
    the same seeds for every arm; ``names`` are the labels of the arms; ``spread`` shows the values of all seeds.
    """
    seeds = sorted({line["seed"] for line in lines})
    steps = max(line["step"][-1] for line in lines)
    values = {
        arm: {name: [last(line[name]) for line in lines if line["arm"] == arm] for name in COLUMNS}
        for arm in dict.fromkeys(line["arm"] for line in lines)
    }
    best = {name: max(mean(of_arm[name]) for of_arm in values.values()) for name in KEPT}
    rows = [
        f"| step {steps}, seeds {', '.join(map(str, seeds))} | {' | '.join(COLUMNS.values())} | lost |",
        "|---" * (len(COLUMNS) + 2) + "|",
    ]
    for arm, of_arm in values.items():
        lost = [COLUMNS[name] for name in KEPT if mean(of_arm[name]) < SHARE * best[name]]
        cells = [spread(of_arm[name]) for name in COLUMNS]
        rows.append(f"| {names[arm]} | {' | '.join(cells)} | {', '.join(lost) or 'nothing'} |")
    return rows


def last(value: float | Sequence[float]) -> float:
    """Return the last one of the values at several steps, or a single value as it is."""
    return value if isinstance(value, float | int) else value[-1]
