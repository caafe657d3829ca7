# Copyright (c) 2026 the megatron_selfdistill authors. Apache-2.0.
"""Measure the tables of learning in docs/adapters.md: adapters of several ranks and learning rates, and all weights.

A cell is one task, one arm, one learning rate and one seed.  Its result is one line of results/adapter_map.jsonl.  A
cell whose line is there is not run again, so that the script may stop at any time and go on later.  A rate is a
multiple of `RATE`, with which the examples train all weights.  The arm ``before`` is the base itself.

    python experiments/adapter_map.py                              every missing cell of the tables of results
    python experiments/adapter_map.py --compare-rates              every missing cell of the tables of rates
    python experiments/adapter_map.py --tasks leak --arms rank_4 --seeds 11
    python experiments/adapter_map.py --tables                     the tables of the page from the lines
    python experiments/adapter_map.py --check                      the status is 1 if the page has other tables

A table stands between <!-- table TASK --> and <!-- end TASK --> in the page; TASK_rates compares learning rates.  A
table shows the seeds that have a line for each of its cells.
"""

from __future__ import annotations

import argparse
import dataclasses
import sys
import time
from collections.abc import Sequence
from itertools import product
from pathlib import Path
from typing import Any

from cell_lines import DOCS, REPOSITORY, RESULTS, Line, append_line, read_lines
from page_tables import complete, seeds_of, spread, write_or_compare

sys.path[:0] = [str(REPOSITORY / "examples")]

from anchored_experiments import EXPERIMENTS, Cell, Experiment  # noqa: E402

from _lib.command_line import prepare_process  # noqa: E402

LINES, PAGE = RESULTS / "adapter_map.jsonl", DOCS / "adapters.md"
CHOICE_SEEDS, SEEDS = (1, 2), (11, 12, 13)
"""The seeds on which the learning rates were chosen, and the seeds that are reported."""
RATE = 3e-4
"""The learning rate with which the examples train all weights."""
RATES = (1, 3, 10, 30)
BEFORE, ALL = "before", "all_weights"
ARMS = {
    BEFORE: "before",
    ALL: "all weights",
    "rank_4": "rank 4",
    "rank_16": "rank 16",
    "rank_16_other_hint": "ablation: rank 16, another problem's hint",
    "rank_16_no_hint": "ablation: rank 16, no hint",
}
"""Name of an arm -> its label in a table."""
RANKS = {ALL: 0, "rank_4": 4, "rank_16": 16}
ABLATIONS = {"rank_16_other_hint": "data.solutions=other", "rank_16_no_hint": "data.solutions=none"}
"""Name of an ablation of rank 16 -> its override."""
_LEAK = dataclasses.replace(EXPERIMENTS["leak"], steps=(100, 200))
TASKS = {
    "quickstart": dataclasses.replace(EXPERIMENTS["quickstart"], steps=(50, 150)),
    "hard": dataclasses.replace(EXPERIMENTS["hard"], steps=(25, 100)),
    "leak": _LEAK,
    "leak_teacher_alone": dataclasses.replace(_LEAK, settings=("target=teacher_alone",)),
}
"""Name of a task -> its runs, all with the default target unless the name names another."""
CHOSEN = {task: dict.fromkeys(ARMS, 10) | {BEFORE: 1, ALL: 1} for task in TASKS}
"""Task -> the rate of each arm in the table of results."""
NAMES = {
    "quickstart": "quickstart",
    "hard": "hard problems",
    "leak": "leaking hint",
    "leak_teacher_alone": "leaking hint, teacher alone",
}
FIGURES = {"greedy": "greedy", "sampled": "sampled", "shows_work": "work"}
"""Figure of a line -> heading of its column."""
SHOWN = {
    "quickstart": ("sampled",),
    "hard": ("sampled",),
    "leak": ("sampled", "shows_work"),
    "leak_teacher_alone": ("greedy", "shows_work"),
}
"""Task -> the figures that the table of results has."""


def main(argv: Sequence[str] | None = None) -> int:
    """Run the missing cells seed by seed, or write or compare the page; return the exit status."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tasks", nargs="+", choices=TASKS, default=list(TASKS))
    parser.add_argument("--arms", nargs="+", choices=ARMS, default=list(ARMS))
    parser.add_argument("--seeds", type=int, nargs="+", help="(default: 11 12 13; with --compare-rates 1 2)")
    parser.add_argument("--compare-rates", type=int, nargs="*", metavar="RATE", help="(default: 1 3 10 30)")
    parser.add_argument("--lines", type=Path, default=LINES, help="(default: experiments/results/adapter_map.jsonl)")
    parser.add_argument("--directory", type=Path, default=Path("runs/adapter_map"), help="bases and runs")
    parser.add_argument("--tables", action="store_true", help="write the tables of the page and run nothing")
    parser.add_argument("--check", action="store_true", help="compare the tables of the page and run nothing")
    options = parser.parse_args(argv)
    lines = read_lines(options.lines)
    if options.tables or options.check:
        return write_or_compare(PAGE, rows_of=lambda name: rows_of(name, lines), compare=options.check)
    done = {(line["task"], line["arm"], line["rate"], line["seed"]) for line in lines}
    compares = options.compare_rates is not None
    prepare_process()
    for seed, task in product(options.seeds or (CHOICE_SEEDS if compares else SEEDS), options.tasks):
        cells = cells_of_rates(options.compare_rates or RATES) if compares else CHOSEN[task].items()
        for arm, rate in cells:
            if arm in options.arms and (task, arm, rate, seed) not in done:
                run_cell(task, arm, rate, seed, options.lines, options.directory)
    return 0


def cells_of_rates(rates: Sequence[int] = RATES) -> list[tuple[str, int]]:
    """Return the arms and rates of a table that compares ``rates``."""
    return list(product(RANKS, rates))


def overrides_of(arm: str, rate: int) -> tuple[str, ...]:
    """Return the overrides of an arm at a multiple of `RATE`; the base needs none."""
    if arm == BEFORE:
        return ()
    rank = RANKS["rank_16" if arm in ABLATIONS else arm]
    adapters = (f"adapter.rank={rank}",) if rank else ()
    return (*adapters, *filter(None, [ABLATIONS.get(arm)]), f"optimizer.lr={rate * RATE:g}")


def run_cell(task: str, arm: str, rate: int, seed: int, lines: Path, root: Path) -> None:
    """Run a cell and append its line."""
    name, began, cpu_began = f"{arm}_x{rate}", time.perf_counter(), time.process_time()
    directory = root / task / f"{name}-seed{seed}"
    line: dict[str, Any] = {"task": task, "arm": arm, "rate": rate, "seed": seed}
    line |= cell_of(TASKS[task], arm, rate, seed).run(root, directory)
    line |= {"seconds": round(time.perf_counter() - began, 1), "cpu_seconds": round(time.process_time() - cpu_began, 1)}
    append_line(lines, line, directory)


def cell_of(experiment: Experiment, arm: str, rate: int, seed: int) -> Cell:
    """Return the run of an arm; the anchored map calls the base itself ``base``."""
    if arm == BEFORE:
        return Cell(experiment, "base", seed)
    return Cell(dataclasses.replace(experiment, arms={arm: overrides_of(arm, rate)}), arm, seed)


def rows_of(name: str, lines: Sequence[Line]) -> list[str]:
    """Return the table ``name`` of the page: the results of all tasks, or a comparison of a task's learning rates."""
    return results_table(lines) if name == "learning" else rates_table(name.removesuffix("_rates"), lines)


def results_table(lines: Sequence[Line]) -> list[str]:
    """Return the table of all tasks: the figures of the last step, a row for each arm at its chosen rate.

    Each cell is the mean over the seeds, with the lowest and the highest seed in brackets.
    """
    headings, columns, found = [], [], []
    for task, figures in SHOWN.items():
        rates = CHOSEN[task]
        asked = [line for line in lines if line["task"] == task and line["rate"] == rates[line["arm"]]]
        found = complete([line for line in asked if line["seed"] in SEEDS], ARMS)
        if not found:
            return ["No seed has a line for every row yet."]
        for figure in figures:
            headings.append(f"{NAMES[task]}: {FIGURES[figure]}")
            of_arms = {arm: [line[figure][-1] for line in found if line["arm"] == arm] for arm in ARMS}
            columns.append({arm: spread(values) for arm, values in of_arms.items()})
    rows = [f"| {' | '.join([seeds_of(found), *headings])} |", "|---" * (len(headings) + 1) + "|"]
    return [*rows, *(f"| {' | '.join([label, *(of[arm] for of in columns)])} |" for arm, label in ARMS.items())]


def rates_table(task: str, lines: Sequence[Line]) -> list[str]:
    """Return the table of a task's sampled accuracy at each measured step, with a column for each rate."""
    cells = [f"{arm} {rate}" for arm, rate in cells_of_rates()]
    of_task = [{**line, "arm": f"{line['arm']} {line['rate']}"} for line in lines if line["task"] == task]
    found = complete([line for line in of_task if line["arm"] in cells and line["seed"] in CHOICE_SEEDS], cells)
    if not found:
        return ["No seed has a line for every cell yet."]
    steps = TASKS[task].steps
    corner = f"sampled at steps {' / '.join(map(str, steps))}, {seeds_of(found)}"
    table = [f"| {corner} | {' | '.join(f'{rate * RATE:.0e}' for rate in RATES)} |", "|---" * (len(RATES) + 1) + "|"]
    for arm in RANKS:
        shown = []
        for rate in RATES:
            of_cell = [line for line in found if line["arm"] == f"{arm} {rate}"]
            shown.append(" / ".join(spread([line["sampled"][at] for line in of_cell]) for at in range(len(steps))))
        table.append(f"| {ARMS[arm]} | {' | '.join(shown)} |")
    return table


if __name__ == "__main__":
    sys.exit(main())
