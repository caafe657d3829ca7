# Copyright (c) 2026 the megatron_selfdistill authors. Apache-2.0.
"""Measure the map of docs/results.md: where the anchored target holds, and where it breaks.

A cell is one experiment, one arm and one seed.  Its result is one line of results/anchored_map.jsonl.  A cell whose
line is there is not run again, so that the script may stop at any time and go on later.

    python experiments/anchored_map.py                       every missing cell
    python experiments/anchored_map.py --only leak sweep     the missing cells of two experiments
    python experiments/anchored_map.py --list                the experiments, their arms, and the lines they have
"""

from __future__ import annotations

import argparse
import sys
import time
from collections.abc import Sequence
from pathlib import Path

from cell_lines import REPOSITORY, RESULTS, append_line, read_lines

sys.path[:0] = [str(REPOSITORY / "examples")]

from anchored_experiments import EXPERIMENTS, SEEDS, SWEEP, Cell, Experiment  # noqa: E402

from _lib.command_line import prepare_process  # noqa: E402

LINES = RESULTS / "anchored_map.jsonl"


def main(argv: Sequence[str] | None = None) -> int:
    """Run the missing cells of the chosen experiments, seed by seed; return the exit status."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", nargs="+", choices=sorted(EXPERIMENTS), help="experiments (default: all)")
    parser.add_argument("--arms", nargs="+", help="names of arms (default: all of an experiment)")
    parser.add_argument("--seeds", type=int, nargs="+", default=SEEDS, help=f"(default: {' '.join(map(str, SEEDS))})")
    parser.add_argument("--lines", type=Path, default=LINES, help="(default: experiments/results/anchored_map.jsonl)")
    parser.add_argument("--directory", type=Path, default=Path("runs/anchored_map"), help="bases and runs")
    parser.add_argument("--list", action="store_true", help="show the experiments and run nothing")
    options = parser.parse_args(argv)
    chosen = [EXPERIMENTS[name] for name in options.only or EXPERIMENTS]
    done = {(line["experiment"], line["arm"], line["seed"]) for line in read_lines(options.lines)}
    if options.list:
        show(chosen, done)
        return 0
    prepare_process()
    for seed in options.seeds:
        for experiment in chosen:
            for arm in arms_of(experiment.name):
                if (experiment.name, arm, seed) not in done and (options.arms is None or arm in options.arms):
                    run_cell(Cell(experiment, arm, seed), options.lines, options.directory)
    return 0


def arms_of(name: str) -> list[str]:
    """Return the base and the arms of an experiment; a cell of the sweep measures the base itself."""
    arms = EXPERIMENTS[name].arms
    return [*([] if arms is SWEEP else ["base"]), *arms]


def run_cell(cell: Cell, lines: Path, root: Path) -> None:
    """Run a cell and append its line."""
    began, directory = time.perf_counter(), root / cell.experiment.name / f"{cell.arm}-seed{cell.seed}"
    line = {"experiment": cell.experiment.name, "arm": cell.arm, "seed": cell.seed}
    line |= cell.run(root, directory) | {"seconds": round(time.perf_counter() - began, 1)}
    append_line(lines, line, directory)


def show(experiments: Sequence[Experiment], done: set[tuple[str, str, int]]) -> None:
    """Print the experiments, their arms and the seeds that have a line."""
    for experiment in experiments:
        print(f"{experiment.name}: {experiment.title}")
        for arm in arms_of(experiment.name):
            seeds = sorted(seed for name, of, seed in done if (name, of) == (experiment.name, arm))
            print(f"    {arm:24} {' '.join(map(str, seeds))}")


if __name__ == "__main__":
    sys.exit(main())
