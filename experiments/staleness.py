# Copyright (c) 2026 the megatron_selfdistill authors. Apache-2.0.
"""Measure how stale responses may be: the quickstart's task with responses of older and older weights.

A cell is one target, one divergence, one rollout.ahead and one seed.  Its result is one line of
results/staleness.jsonl.  A cell whose line is there is not run again, so that the script may stop at any time and go on
later.  The runs need no servers (stale_responses.py).  A simulated clock gives the time that servers would save:
generation takes `GENERATION` of a step in turns, and a step ahead takes the longer of generation and training.

    python experiments/staleness.py                                every missing cell
    python experiments/staleness.py --arms student_reverse_4 --seeds 21
    python experiments/staleness.py --table                        print the table
    python experiments/staleness.py --write                        write the table into docs/benchmarks.md
    python experiments/staleness.py --check                        the status is 1 if the page has another table
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

from cell_lines import DOCS, REPOSITORY, RESULTS, Line, append_line, read_lines
from page_tables import complete, seeds_of, spread, write_or_compare

sys.path[:0] = [str(REPOSITORY / "examples")]

from anchored_experiments import EXPERIMENTS, SIX, Cell, Figures, columns  # noqa: E402

from _lib.command_line import prepare_process  # noqa: E402
from _lib.pretraining import Base  # noqa: E402
from _lib.variants import Variant  # noqa: E402

LINES, PAGE = RESULTS / "staleness.jsonl", DOCS / "benchmarks.md"
SEEDS = (21, 22, 23)
GENERATION = 0.8
"""Share of a step in turns that generation takes in the simulated clock; a step in turns takes 1."""
TIMES = (8, 16, 32, 64)
"""The times at which runs are compared, in steps in turns."""
OVERLAPPED = {time: round(time / max(GENERATION, 1 - GENERATION)) for time in TIMES}
"""Time -> the number of overlapped steps that end by then."""
STEPS = tuple(sorted({*TIMES, *OVERLAPPED.values()}))
"""The steps at which a run is measured; the last one is the length of the run."""
SHOWN = (32, 80)
"""The steps that the table of the page has."""
TABLE = "staleness"
"""The name of the table of the page."""
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
    """Run the missing cells seed by seed, or show, write or compare the table; return the exit status."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--arms", nargs="+", choices=[BEFORE, *ARMS], default=[BEFORE, *ARMS], help="(default: all)")
    parser.add_argument("--seeds", type=int, nargs="+", default=SEEDS, help=f"(default: {' '.join(map(str, SEEDS))})")
    parser.add_argument("--lines", type=Path, default=LINES, help="(default: experiments/results/staleness.jsonl)")
    parser.add_argument("--directory", type=Path, default=Path("runs/staleness"), help="bases and runs")
    parser.add_argument("--table", action="store_true", help="print the table and run nothing")
    parser.add_argument("--write", action="store_true", help="write the table of the page and run nothing")
    parser.add_argument("--check", action="store_true", help="compare the table of the page and run nothing")
    options = parser.parse_args(argv)
    lines = read_lines(options.lines)
    if options.table:
        print("\n".join(rows_of(TABLE, lines)))
        return 0
    if options.write or options.check:
        return write_or_compare(PAGE, rows_of=lambda name: rows_of(name, lines), compare=options.check)
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
    """Return the table of the page: accuracies at age 0, and below them what age costs at equal steps, in points.

    Each cell is the mean of the seeds that have a line for each arm, with the lowest and the highest seed in brackets.
    """
    found = complete(lines, [BEFORE, *ARMS])
    if name != TABLE or not found:
        raise ValueError(f"expected the table {TABLE} and a seed with a line for every arm, got {name}")
    headings = [f"{step} steps" for step in SHOWN]
    before = spread([line["sampled"][0] for line in found if line["arm"] == BEFORE])
    rows = [
        f"| anchor, divergence; {seeds_of(found)} | ahead | {' | '.join(headings)} |",
        "|---" * (len(headings) + 2) + "|",
        f"| before | | {before} |{' |' * (len(headings) - 1)}",
    ]
    for arm in ARMS.values():
        cells = [cost(found, arm, step) if arm.ahead else accuracy(found, arm, step) for step in SHOWN]
        rows.append(f"| {arm.label} | {arm.age} | {' | '.join(cells)} |")
    return rows


def cost(lines: Sequence[Line], arm: Arm, step: int) -> str:
    """Return the accuracy of an arm after ``step`` steps less that of the same arm and seed at age 0, in points."""
    at, fresh = STEPS.index(step), dataclasses.replace(arm, ahead=0, corrects=False)
    pairs = zip(values(lines, arm), values(lines, fresh), strict=True)
    return signed_spread([100 * (one[at] - other[at]) for one, other in pairs])


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


if __name__ == "__main__":
    sys.exit(main())
