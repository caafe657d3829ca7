# Copyright (c) 2026 the megatron_selfdistill authors. Apache-2.0.
"""Write the table of an experiment on thinking: accuracy by budget, attempts, forks, and which arms keep them.

    python tools/benchmarks/thinking_table.py docs/anchored_map_thinking.jsonl choosing

The experiments are those of anchored_experiments.py on choosing_subtraction.py.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
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


def main(argv: Sequence[str] | None = None) -> int:
    """Print the table of one experiment; return the exit status."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("lines", type=Path, help="the file of the lines")
    parser.add_argument("experiment", help="the name of the experiment")
    options = parser.parse_args(argv)
    lines = [json.loads(line) for line in options.lines.read_text(encoding="utf-8").splitlines()]
    print("\n".join(table([line for line in lines if line["experiment"] == options.experiment])))
    return 0


def table(lines: Sequence[Line]) -> list[str]:
    """Return a row for each arm: the mean over the seeds of all figures after the last step, and what the arm lost.

    An arm has lost a figure of `KEPT` whose mean is below `SHARE` of the best arm's mean.  The seeds are those with a
    line for every arm.
    Raises: ValueError where no seed has a line for every arm.
    """
    arms = list(dict.fromkeys(line["arm"] for line in lines))
    seeds = sorted(set.intersection(*({line["seed"] for line in lines if line["arm"] == arm} for arm in arms)))
    if not seeds:
        raise ValueError("expected a seed with a line for every arm, got none; measure the missing cells first")
    means = {arm: figures([line for line in lines if line["arm"] == arm and line["seed"] in seeds]) for arm in arms}
    best = {name: max(of_arm[name] for of_arm in means.values()) for name in KEPT}
    steps = max(line["step"][-1] for line in lines)
    rows = [
        f"| step {steps}, seeds {', '.join(map(str, seeds))} | {' | '.join(COLUMNS.values())} | lost |",
        "|---" * (len(COLUMNS) + 2) + "|",
    ]
    for arm, of_arm in means.items():
        lost = [COLUMNS[name] for name in KEPT if of_arm[name] < SHARE * best[name]]
        cells = [f"{of_arm[name]:.2f}" for name in COLUMNS]
        rows.append(f"| {arm} | {' | '.join(cells)} | {', '.join(lost) or 'nothing'} |")
    return rows


def figures(lines: Sequence[Line]) -> dict[str, float]:
    """Return the means of all figures after the last step over lines of one arm."""
    return {name: mean(last(line[name]) for line in lines) for name in COLUMNS}


def last(value: float | Sequence[float]) -> float:
    """Return the last one of the values at several steps, or a single value as it is."""
    return value if isinstance(value, float | int) else value[-1]


if __name__ == "__main__":
    sys.exit(main())
