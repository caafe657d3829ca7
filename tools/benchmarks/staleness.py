# Copyright (c) 2026 the megatron_selfdistill authors. Apache-2.0.
"""Measure how stale responses may be: the quickstart's task with responses of older and older weights.

A cell is one target, one divergence, one rollout.ahead and one seed; its result is one line of docs/staleness.jsonl.  A
cell whose line is there is not run again, so that the script may stop at any time and go on later.  The runs need no
servers (stale_responses.py); a simulated clock gives the time that servers would save: generation takes `GENERATION` of
a step in turns, and a step ahead takes the longer of generation and training.

    python tools/benchmarks/staleness.py                                every missing cell
    python tools/benchmarks/staleness.py --arms student_reverse_4 --seeds 21
    python tools/benchmarks/staleness.py --table                        print the tables
    python tools/benchmarks/staleness.py --write                        write the tables into docs/benchmarks.md
    python tools/benchmarks/staleness.py --check                        the status is 1 where the page has other tables
"""

from __future__ import annotations

import argparse
import dataclasses
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import mean

from cell_lines import DOCS, REPOSITORY, Line, append_line, read_lines
from page_tables import complete, seeds_of, spread, write_or_compare

sys.path[:0] = [str(REPOSITORY / "examples")]

from anchored_experiments import EXPERIMENTS, SIX, Cell, Figures, columns  # noqa: E402

from _lib.command_line import prepare_process  # noqa: E402
from _lib.pretraining import Base  # noqa: E402
from _lib.variants import Variant  # noqa: E402

LINES, PAGE = DOCS / "staleness.jsonl", DOCS / "benchmarks.md"
SEEDS = (21, 22, 23)
GENERATION = 0.8
"""Share of a step in turns that generation takes in the simulated clock; a step in turns takes 1."""
TIMES = (8, 16, 32, 64)
"""The times at which runs are compared, in steps in turns."""
OVERLAPPED = {time: round(time / max(GENERATION, 1 - GENERATION)) for time in TIMES}
"""Time -> the number of overlapped steps that end by then."""
STEPS = tuple(sorted({*TIMES, *OVERLAPPED.values()}))
"""The steps at which a run is measured; the last one is the length of the run."""
NUM_SAMPLES = 4
"""Sampled responses per held-out problem at each point."""
AHEAD = (0, 1, 4, 16)
BEFORE = "base"
"""The arm that measures the base itself."""
TARGETS = {"student": "student_matched", "reference": "anchored_matched"}
"""The anchor of a target -> the arm of the anchored map with this target."""
DIVERGENCES = {"reverse": "reverse KL", "forward": "forward KL"}


@dataclass(frozen=True)
class Arm:
    """The runs that differ in their seed alone."""

    anchor: str
    divergence: str
    ahead: int
    corrects: bool = False
    """Whether importance weights correct for the age of the responses."""

    @property
    def name(self) -> str:
        """The name of the arm in the lines."""
        return f"{self.anchor}_{self.divergence}_{self.ahead}{'_truncated' * self.corrects}"

    @property
    def overrides(self) -> tuple[str, ...]:
        """The overrides of the configuration; `watch_stale` has rollout.ahead."""
        correction = ("loss.rollout_correction=truncated",) if self.corrects else ()
        divergence = f"loss.divergence={self.divergence}_kl"
        return (*SIX[TARGETS[self.anchor]], divergence, f"rollout.max_staleness={max(4, self.ahead)}", *correction)

    @property
    def label(self) -> str:
        """The label of the arm in a table, without its age."""
        return f"{self.anchor}, {DIVERGENCES[self.divergence]}"

    @property
    def age(self) -> str:
        """The label of the age of the responses."""
        return f"{self.ahead}{', truncated' * self.corrects}"


GRID = [Arm(anchor, divergence, ahead) for anchor in TARGETS for divergence in DIVERGENCES for ahead in AHEAD]
ARMS = {arm.name: arm for arm in [*GRID, Arm("student", "reverse", 4, corrects=True)]}


def main(argv: Sequence[str] | None = None) -> int:
    """Run the missing cells seed by seed, or show, write or compare the tables; return the exit status."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--arms", nargs="+", choices=[BEFORE, *ARMS], default=[BEFORE, *ARMS], help="(default: all)")
    parser.add_argument("--seeds", type=int, nargs="+", default=SEEDS, help=f"(default: {' '.join(map(str, SEEDS))})")
    parser.add_argument("--lines", type=Path, default=LINES, help="(default: docs/staleness.jsonl)")
    parser.add_argument("--directory", type=Path, default=Path("runs/staleness"), help="bases and runs")
    parser.add_argument("--table", action="store_true", help="print the tables and run nothing")
    parser.add_argument("--write", action="store_true", help="write the tables of the page and run nothing")
    parser.add_argument("--check", action="store_true", help="compare the tables of the page and run nothing")
    options = parser.parse_args(argv)
    lines = read_lines(options.lines)
    if options.table:
        print("\n\n".join("\n".join(rows_of(name, lines)) for name in TABLES))
        return 0
    if options.write or options.check:
        return write_or_compare(PAGE, lambda name: rows_of(name, lines), compare=options.check)
    done = {(line["arm"], line["seed"]) for line in lines}
    prepare_process()
    for seed in options.seeds:
        for arm in options.arms:
            if (arm, seed) not in done:
                run_cell(arm, seed, options.lines, options.directory)
    return 0


def run_cell(arm: str, seed: int, lines: Path, root: Path) -> None:
    """Run a cell and append its line."""
    began, cpu_began, directory = time.perf_counter(), time.process_time(), root / f"{arm}-seed{seed}"
    line: Figures = {"arm": arm, "seed": seed} | cell_of(arm, seed).run(root, directory)
    line |= {"seconds": round(time.perf_counter() - began, 1), "cpu_seconds": round(time.process_time() - cpu_began, 1)}
    append_line(lines, line, directory)


def cell_of(name: str, seed: int) -> Cell:
    """Return the run of an arm on the task of the quickstart."""
    quickstart = dataclasses.replace(EXPERIMENTS["quickstart"], steps=STEPS, num_samples=NUM_SAMPLES)
    if name == BEFORE:
        return Cell(quickstart, BEFORE, seed)
    arm = ARMS[name]

    def measured(variant: Variant, base: Base, run_dir: Path, steps: Sequence[int]) -> Figures:
        from stale_responses import watch_stale  # imports torch

        return columns(watch_stale(variant, base, run_dir, steps, ahead=arm.ahead, num_samples=NUM_SAMPLES))

    return Cell(dataclasses.replace(quickstart, arms={name: arm.overrides}, measure=measured), name, seed)


def rows_of(name: str, lines: Sequence[Line]) -> list[str]:
    """Return the table ``name`` of the page, of the seeds that have a line for each arm."""
    found = complete(lines, [BEFORE, *ARMS])
    return TABLES[name](found) if found else ["No seed has a line for every row yet."]


def steps_table(lines: Sequence[Line]) -> list[str]:
    """Return the table at equal steps: the sampled accuracy of each arm after each number of steps.

    Each cell is the mean over the seeds, with the lowest and the highest seed in brackets.
    """
    rows = head([f"{step} steps" for step in STEPS], lines)
    for arm in ARMS.values():
        rows.append(f"| {arm.label} | {arm.age} | {' | '.join(accuracy(lines, arm, step) for step in STEPS)} |")
    return rows


def time_table(lines: Sequence[Line]) -> list[str]:
    """Return the table at equal time: the sampled accuracy of each way of overlapping at each time of the clock."""
    rows = head([f"time {time}" for time in TIMES], lines)
    for arm in ARMS.values():
        if arm.ahead == 0:
            cells = " | ".join(accuracy(lines, arm, time) for time in TIMES)
            rows.append(f"| {arm.label} | 0, in turns | {cells} |")
        age = arm.age if arm.ahead else "0, streamed"
        rows.append(f"| {arm.label} | {age} | {' | '.join(accuracy(lines, arm, OVERLAPPED[time]) for time in TIMES)} |")
    return rows


def difference_table(lines: Sequence[Line]) -> list[str]:
    """Return the table of what age costs at equal steps: accuracy less that of the same arm and seed at age 0.

    Each cell is in points: the mean over the seeds, with the lowest and the highest seed in brackets.
    """
    rows = head([f"{step} steps" for step in STEPS], lines)[:2]
    for arm in ARMS.values():
        if arm.ahead:
            fresh = dataclasses.replace(arm, ahead=0, corrects=False)
            pairs = zip(values(lines, arm), values(lines, fresh), strict=True)
            points = [[100 * (one - other) for one, other in zip(*pair, strict=True)] for pair in pairs]
            cells = [signed_spread(of_step) for of_step in zip(*points, strict=True)]
            rows.append(f"| {arm.label} | {arm.age} | {' | '.join(cells)} |")
    return rows


def head(headings: Sequence[str], lines: Sequence[Line]) -> list[str]:
    """Return the first rows of a table: its headings, and the accuracy of the base."""
    before = spread([line["sampled"][0] for line in lines if line["arm"] == BEFORE])
    return [
        f"| anchor, divergence; {seeds_of(lines)} | ahead | {' | '.join(headings)} |",
        "|---" * (len(headings) + 2) + "|",
        f"| before | | {before} |{' |' * (len(headings) - 1)}",
    ]


def accuracy(lines: Sequence[Line], arm: Arm, step: int) -> str:
    """Return the sampled accuracy of an arm after ``step`` steps: the mean of the seeds, with lowest and highest."""
    return spread([of_seed[STEPS.index(step)] for of_seed in values(lines, arm)])


def signed_spread(points: Sequence[float]) -> str:
    """Return the mean of the seeds with the lowest and highest in brackets, with their signs."""
    shown = [f"{round(value, 1) + 0.0:+.1f}" for value in (mean(points), min(points), max(points))]
    return f"{shown[0]} [{shown[1]} {shown[2]}]"


def values(lines: Sequence[Line], arm: Arm) -> list[Sequence[float]]:
    """Return the sampled accuracies of an arm after each of `STEPS`, for each seed in ascending order."""
    of_arm = [line for line in lines if line["arm"] == arm.name]
    return [line["sampled"] for line in sorted(of_arm, key=lambda line: line["seed"])]


TABLES = {
    "staleness_steps": steps_table,
    "staleness_difference": difference_table,
    "staleness_time": time_table,
}
"""Name of a table of the page -> the function that makes it."""


if __name__ == "__main__":
    sys.exit(main())
