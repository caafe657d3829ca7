# Copyright (c) 2026 the megatron_selfdistill authors. Apache-2.0.
"""Measure the rows of examples/10_recipes.py over seeds, and write the tables of docs/recipes/comparison.md.

A cell is one block, one row and one seed; its result is one line of results/recipe_table.jsonl.  A cell whose line is
there is not run again, so that the script may stop at any time and go on later.  The row ``before`` is the base itself.

    python experiments/recipe_table.py                         every missing cell
    python experiments/recipe_table.py --blocks additions --rows default grpo --seeds 21
    python experiments/recipe_table.py --learning-rates        the cells with other learning rates
    python experiments/recipe_table.py --tables                the tables of the page from the lines
    python experiments/recipe_table.py --check                 the status is 1 if the page has other tables

A table stands between <!-- table NAME --> and <!-- end NAME --> in the page; NAME is one of `TABLES`, or BLOCK_rates,
which compares learning rates.  A table shows the seeds that have a line for each of its cells.
"""

from __future__ import annotations

import argparse
import importlib
import sys
from collections.abc import Mapping, Sequence
from itertools import product
from pathlib import Path
from statistics import mean
from typing import Any

from cell_lines import DOCS, REPOSITORY, RESULTS, Line, append_line, read_lines
from page_tables import complete, seeds_of, spread, write_or_compare

sys.path[:0] = [str(REPOSITORY / "examples")]

from _lib.command_line import prepare_process  # noqa: E402
from _lib.measurement import measure  # noqa: E402
from _lib.pretraining import make_base, write_records  # noqa: E402

example = importlib.import_module("10_recipes")

LINES, PAGE = RESULTS / "recipe_table.jsonl", DOCS / "recipes" / "comparison.md"
SEEDS = (21, 22, 23)
"""The seeds that are reported; no setting was chosen on them."""
BEFORE = "before"
ROWS = (BEFORE, *example.ROWS)
HEADINGS = {
    "sampled_at_quarter": f"at step {example.NUM_STEPS // 4}",
    "sampled_at_half": f"at step {example.NUM_STEPS // 2}",
}
"""Figure of a line -> heading of its column, if the example says it in another way."""
BLOCK_NAMES = {"unsolved": "never solved"}
"""Block -> its name in a heading, if it has another one there."""
TABLES: dict[str, dict[str, tuple[str, ...]]] = {
    "answers": {
        "subtraction": ("sampled", "sampled_at_half", "cpu_seconds"),
        "additions": ("sampled", "different"),
        "unsolved": ("sampled",),
    },
    "calculator": {"calculator": ("sampled", "sampled_at_quarter", "sampled_at_half")},
    "stating": {"stating": ("greedy", "sampled", "ocg", "ece", "spr")},
    "checked": {"checked": ("greedy", "sampled", "sampled_at_half")},
}
"""Name of a table of the page -> block -> the figures of its columns."""
RATE = 3e-4
"""The learning rate of all rows of a block."""
RATES = (1e-4, RATE, 1e-3)
RATED = ("default", "sdft", "sdpo", "pi_distill", "grpo", "rft")
"""The rows that are compared at several learning rates."""


def main(argv: Sequence[str] | None = None) -> int:
    """Run the missing cells seed by seed, or write or compare the page; return the exit status."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--blocks", nargs="+", choices=example.BLOCKS, default=list(example.BLOCKS))
    parser.add_argument("--rows", nargs="+", choices=ROWS, default=list(ROWS))
    parser.add_argument("--seeds", type=int, nargs="+", default=SEEDS, help=f"(default: {' '.join(map(str, SEEDS))})")
    parser.add_argument("--learning-rates", action="store_true", help="run the cells of the tables of learning rates")
    parser.add_argument("--lines", type=Path, default=LINES, help="(default: experiments/results/recipe_table.jsonl)")
    parser.add_argument("--directory", type=Path, default=Path("runs/recipe_table"), help="bases and runs")
    parser.add_argument("--tables", action="store_true", help="write the tables of the page and run nothing")
    parser.add_argument("--check", action="store_true", help="compare the tables of the page and run nothing")
    options = parser.parse_args(argv)
    lines = read_lines(options.lines)
    if options.tables or options.check:
        return write_or_compare(PAGE, lambda name: table_of(name, lines), compare=options.check)
    done = {(line["block"], line["row"], line["seed"], rate_of(line)) for line in lines}
    rates = [rate for rate in RATES if rate != RATE] if options.learning_rates else [RATE]
    prepare_process()
    for seed, block, row, rate in product(options.seeds, options.blocks, options.rows, rates):
        asked = RATED if options.learning_rates else rows_of_block(block)
        if row in asked and (block, row, seed, rate) not in done:
            run_cell(block, row, seed, rate, options.lines, options.directory)
    return 0


def rows_of_block(block: str) -> tuple[str, ...]:
    """Return the rows of the tables of a block."""
    return (BEFORE, *example.BLOCKS[block].rows)


def rate_of(line: Line) -> float:
    """Return the learning rate of a line's run."""
    return float(line.get("lr", RATE))


def settings_of(rate: float) -> tuple[str, ...]:
    """Return the overrides of a run with a learning rate beside those of its row."""
    return () if rate == RATE else (f"optimizer.lr={rate:g}",)


def run_cell(name: str, row: str, seed: int, rate: float, lines: Path, root: Path) -> None:
    """Run a cell, append its line, and remove its run; the base stays for the other cells."""
    about = {"block": name, "row": row, "seed": seed} | ({} if rate == RATE else {"lr": rate})
    line = about | rounded(cell(name, row, seed, settings_of(rate), root))
    append_line(lines, line, root / f"{name}-seed{seed}")


def cell(name: str, row: str, seed: int, settings: Sequence[str], root: Path) -> dict[str, Any]:
    """Return the figures of a cell, and its overrides without the directories of this machine.

    ``settings``: the overrides of the cell beside those of its row.
    """
    block, directory = example.BLOCKS[name], root / f"{name}-seed{seed}"
    base = make_base(block.task, seed, root / "bases")
    if row == BEFORE:
        return dict(example.measured(measure(base, num_samples=block.num_measured)))
    problems = write_records(directory / "train.jsonl", block.task.training_problems(seed))
    outcome = example.run(row, block, base, problems, directory, example.NUM_STEPS, settings)
    return {"overrides": [*example.overrides_of(row, block), *settings], **example.figures(row, outcome)}


def rounded(figures: Mapping[str, Any]) -> dict[str, Any]:
    """Return the figures with at most four digits after the point, also in lists."""

    def short(value: Any) -> Any:
        return round(value, 4) if isinstance(value, float) else value

    return {
        name: [short(one) for one in value] if isinstance(value, list) else short(value)
        for name, value in figures.items()
    }


def table_of(name: str, lines: Sequence[Line]) -> list[str]:
    """Return the table ``name`` of the page: one of `TABLES`, or BLOCK_rates, a comparison of learning rates."""
    block, _, kind = name.partition("_")
    return rates_table(block, lines) if kind == "rates" else results_table(TABLES[name], lines)


def results_table(figures: Mapping[str, Sequence[str]], lines: Sequence[Line]) -> list[str]:
    """Return the table of what the rows of the blocks in ``figures`` have reached, a row for each recipe.

    Each cell is the mean over the seeds, with the lowest and the highest seed in brackets.  ``figures``: block -> its
    figures.  All blocks have the same rows.
    """
    found = {block: lines_of(block, lines) for block in figures}
    if not all(found.values()):
        return ["No seed has a line for every row yet."]
    several = len(figures) > 1
    headings = [
        f"{BLOCK_NAMES.get(block, block)}: {heading(figure)}" if several else heading(figure)
        for block, of_block in figures.items()
        for figure in of_block
    ]
    corner = seeds_of([line for of_block in found.values() for line in of_block])
    headings = [corner, "teacher sees", "responses", *headings]
    table = [f"| {' | '.join(headings)} |", "|---" * len(headings) + "|"]
    for name in rows_of_block(next(iter(figures))):
        row = example.ROWS.get(name)
        about = ["", ""] if row is None else [row.sees, row.budget]
        cells = [
            shown(figure, [line.get(figure) for line in found[block] if line["row"] == name])
            for block, of_block in figures.items()
            for figure in of_block
        ]
        table.append(f"| {' | '.join([BEFORE if row is None else row.title, *about, *cells])} |")
    return table


def heading(figure: str) -> str:
    """Return the heading of a figure's column."""
    return HEADINGS.get(figure) or (example.RESULTS | example.BUDGET)[figure][0]


def rates_table(name: str, lines: Sequence[Line]) -> list[str]:
    """Return the table of the sampled accuracy of the rows of `RATED`, with a column for each learning rate."""
    cells = [f"{row} {rate:g}" for row in RATED for rate in RATES]
    of_block = [{**line, "arm": f"{line['row']} {rate_of(line):g}"} for line in lines if line["block"] == name]
    found = complete([line for line in of_block if line["arm"] in cells], cells)
    if not found:
        return ["No seed has a line for every cell yet."]
    corner = f"sampled at step {example.NUM_STEPS}, {seeds_of(found)}"
    table = [f"| {' | '.join([corner, *(f'{rate:.0e}' for rate in RATES)])} |", "|---" * (len(RATES) + 1) + "|"]
    for row in RATED:
        shown_cells = [
            spread([line["sampled"] for line in found if line["arm"] == f"{row} {rate:g}"]) for rate in RATES
        ]
        table.append(f"| {' | '.join([example.ROWS[row].title, *shown_cells])} |")
    return table


def lines_of(name: str, lines: Sequence[Line]) -> list[Line]:
    """Return the lines of a block at the common learning rate, of the seeds that have a line for each row."""
    of_block = [line for line in lines if line["block"] == name and rate_of(line) == RATE]
    return complete([{**line, "arm": line["row"]} for line in of_block], rows_of_block(name))


def shown(figure: str, values: Sequence[float | None]) -> str:
    """Return the mean and the extremes of the seeds, or for tokens and seconds the mean as a whole number."""
    whole = [value for value in values if value is not None and figure in ("tokens", "cpu_seconds")]
    return f"{mean(whole):.0f}" if whole else spread(values)


if __name__ == "__main__":
    sys.exit(main())
