# Copyright (c) 2026 the megatron_selfdistill authors. Apache-2.0.
"""Measure the rows of examples/10_recipes.py over seeds, and write the tables of docs/recipes/comparison.md.

A cell is one block, one row and one seed; its result is one line of results/recipe_table.jsonl.  A cell whose line is
there is not run again, so that the script may stop at any time and go on later.  The row ``before`` is the base itself.

Cells of the validation split choose the learning rate of a row: they train on four fifths of the training problems from
the base of another seed, and measure on the other fifth.  A row with a validation line for each rate is reported at the
rate with the best sampled accuracy there, and every other row at the rate of its recipe, which is that of the examples.

    python experiments/recipe_table.py                         every missing cell, at the chosen rates
    python experiments/recipe_table.py --validate --rows opsd  the cells that choose the learning rate of a row
    python experiments/recipe_table.py --blocks additions --rows default grpo --seeds 21
    python experiments/recipe_table.py --learning-rates        the cells with other learning rates
    python experiments/recipe_table.py --tables                the tables of the page from the lines
    python experiments/recipe_table.py --check                 the status is 1 if the page has other tables

A table stands between <!-- table NAME --> and <!-- end NAME --> in the page; NAME is one of `TABLES`, or BLOCK_rates,
which compares learning rates.  A table shows the seeds that have a line for each of its cells.
"""

from __future__ import annotations

import argparse
import hashlib
import importlib
import sys
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import product
from pathlib import Path
from statistics import mean
from typing import Any

from cell_lines import DOCS, FURTHER_TABLES, REPOSITORY, RESULTS, Line, append_line, read_lines
from page_tables import complete, seeds_of, spread, write_or_compare

sys.path[:0] = [str(REPOSITORY / "examples")]

from _lib.command_line import prepare_process  # noqa: E402
from _lib.measurement import measure  # noqa: E402
from _lib.pretraining import make_base, write_records  # noqa: E402
from _lib.task import Record  # noqa: E402

example = importlib.import_module("10_recipes")

LINES = RESULTS / "recipe_table.jsonl"
PAGES = (DOCS / "recipes" / "comparison.md", FURTHER_TABLES / "learning_rates.md")
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
        "subtraction": ("sampled",),
        "additions": ("sampled", "different"),
        "unsolved": ("sampled",),
    },
    "calculator": {"calculator": ("sampled", "sampled_at_quarter", "sampled_at_half")},
    "stating": {"stating": ("greedy", "sampled", "ocg", "spr")},
    "checked": {"checked": ("greedy", "sampled")},
}
"""Name of a table of the page -> block -> the figures of its columns."""
RATE = 3e-4
"""The learning rate of the recipes in the examples, which every row has that is not tuned."""
RATES = (1e-4, RATE, 1e-3)
"""The rates that validation chooses from: a third of that rate, the rate itself, and ten thirds of it."""
TEST, VALIDATION = "test", "validation"
"""The splits of a line: the held-out problems of the task, and training problems that the run does not train on."""
CHOICE_SEED, NUM_VALIDATION = 20, 300
"""The seed of the cells of validation, and the largest number of their problems."""
RATED = ("default", "sdft", "sdpo", "pi_distill", "grpo", "rft")
"""The rows that are compared at several learning rates."""


def main(argv: Sequence[str] | None = None) -> int:
    """Run the missing cells seed by seed, or write or compare the page; return the exit status."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--blocks", nargs="+", choices=example.BLOCKS, default=list(example.BLOCKS))
    parser.add_argument("--rows", nargs="+", choices=ROWS, default=list(ROWS))
    parser.add_argument("--seeds", type=int, nargs="+", help="(default: 21 22 23; with --validate 20)")
    parser.add_argument("--learning-rates", action="store_true", help="run the cells of the tables of learning rates")
    parser.add_argument("--validate", action="store_true", help="run the cells that choose learning rates")
    parser.add_argument("--lines", type=Path, default=LINES, help="(default: experiments/results/recipe_table.jsonl)")
    parser.add_argument("--directory", type=Path, default=Path("runs/recipe_table"), help="bases and runs")
    parser.add_argument("--tables", action="store_true", help="write the tables of the page and run nothing")
    parser.add_argument("--check", action="store_true", help="compare the tables of the page and run nothing")
    options = parser.parse_args(argv)
    lines = read_lines(options.lines)
    if options.tables or options.check:
        return write_or_compare(*PAGES, rows_of=lambda name: table_of(name, lines), compare=options.check)
    prepare_process()
    split = VALIDATION if options.validate else TEST
    seeds = options.seeds or ([CHOICE_SEED] if options.validate else SEEDS)
    for seed, block, row, rate in product(seeds, options.blocks, options.rows, RATES):
        cell = Cell(block, row, seed, rate, split)
        if rate in asked_rates(cell, lines, options.learning_rates) and not any(map(cell.is_of, lines)):
            run_cell(cell, options.lines, options.directory)
    return 0


@dataclass(frozen=True)
class Cell:
    """One run: a row of a block from the base of a seed, at a learning rate, measured on a split."""

    block: str
    row: str
    seed: int
    rate: float
    split: str = TEST

    @property
    def name(self) -> dict[str, Any]:
        """The entries of the line by which the cell is found."""
        about: dict[str, Any] = {"block": self.block, "row": self.row, "seed": self.seed}
        about |= {} if self.rate == RATE else {"lr": self.rate}
        return about | ({} if self.split == TEST else {"split": self.split})

    def is_of(self, line: Line) -> bool:
        """Return whether the line is the result of this cell."""
        names = (line["block"], line["row"], line["seed"], rate_of(line), split_of(line))
        return names == (self.block, self.row, self.seed, self.rate, self.split)

    @property
    def settings(self) -> tuple[str, ...]:
        """The overrides of the run beside those of its row."""
        return () if self.rate == RATE else (f"optimizer.lr={self.rate:g}",)

    def run(self, root: Path) -> dict[str, Any]:
        """Return the figures of the cell, and its overrides without the directories of this machine."""
        block, directory = example.BLOCKS[self.block], root / f"{self.block}-seed{self.seed}"
        base, records = make_base(block.task, self.seed, root / "bases"), block.task.training_problems(self.seed)
        if self.split == VALIDATION:
            records, held_out = divided(records)
            base = replace(base, held_out=write_records(directory / "validation.jsonl", held_out))
        if self.row == BEFORE:
            return dict(example.measured(measure(base, num_samples=block.num_measured)))
        problems = write_records(directory / "train.jsonl", records)
        outcome = example.run(self.row, block, base, problems, directory, example.NUM_STEPS, self.settings)
        overrides = [*example.overrides_of(self.row, block), *self.settings]
        return {"overrides": overrides, **example.figures(self.row, outcome)}


def asked_rates(cell: Cell, lines: Sequence[Line], learning_rates: bool) -> Sequence[float]:
    """Return the learning rates at which the row of ``cell`` runs; ``learning_rates``: as for the tables of rates."""
    if learning_rates:
        return RATES if cell.row in RATED else ()
    if cell.row not in rows_of_block(cell.block):
        return ()
    if cell.split == VALIDATION:
        return () if cell.row == BEFORE else RATES
    return (chosen_rate(cell.block, cell.row, lines) or RATE,)


def divided(records: Sequence[Record]) -> tuple[list[Record], list[Record]]:
    """Return the records to train on, and those to validate on: a fifth of all texts of problems, each of them once.

    The hash of a problem's text decides, so that no problem is in both.
    """

    def is_held_out(record: Record) -> bool:
        return int(hashlib.md5(record["problem"].encode()).hexdigest()[:6], 16) % 5 == 0

    held_out = {record["problem"]: record for record in records if is_held_out(record)}
    return [record for record in records if not is_held_out(record)], list(held_out.values())[:NUM_VALIDATION]


def rows_of_block(block: str) -> tuple[str, ...]:
    """Return the rows of the tables of a block."""
    return (BEFORE, *example.BLOCKS[block].rows)


def rate_of(line: Line) -> float:
    """Return the learning rate of a line's run."""
    return float(line.get("lr", RATE))


def split_of(line: Line) -> str:
    """Return the split of a line's problems."""
    return str(line.get("split", TEST))


def chosen_rate(block: str, row: str, lines: Sequence[Line]) -> float | None:
    """Return the rate with the best sampled accuracy on validation; None unless every rate of `RATES` has a line.

    Of equally good rates the result is the smallest one.
    """
    of_row = [line for line in lines if (line["block"], line["row"], split_of(line)) == (block, row, VALIDATION)]
    reached = {rate_of(line): line["sampled"] for line in of_row}
    return max(RATES, key=lambda rate: reached[rate]) if reached.keys() >= set(RATES) else None


def run_cell(cell: Cell, lines: Path, root: Path) -> None:
    """Run a cell, append its line, and remove its run; the base stays for the other cells."""
    append_line(lines, cell.name | rounded(cell.run(root)), root / f"{cell.block}-seed{cell.seed}")


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

    Each cell is the mean over the seeds, with the lowest and the highest seed in brackets.  It is empty for a row that
    a block does not have, or that lacks a seed.  ``figures``: block -> its figures; the first block has all rows.
    """
    found = {block: reported_lines(block, lines) for block in figures}
    if not all(found.values()):
        return ["No row has a line for every seed yet."]
    several = len(figures) > 1
    headings = [
        f"{BLOCK_NAMES.get(block, block)}: {heading(figure)}" if several else heading(figure)
        for block, of_block in figures.items()
        for figure in of_block
    ]
    corner = seeds_of([line for of_block in found.values() for line in of_block])
    headings = [corner, "learning rate", *headings]
    table = [f"| {' | '.join(headings)} |", "|---" * len(headings) + "|"]
    for name in rows_of_block(next(iter(figures))):
        row = example.ROWS.get(name)
        cells = [
            shown(figure, [line.get(figure) for line in found[block] if line["row"] == name])
            for block, of_block in figures.items()
            for figure in of_block
        ]
        about = [BEFORE, ""] if row is None else [row.title, tuned_on(name, figures, lines)]
        table.append(f"| {' | '.join([*about, *cells])} |")
    return table


def heading(figure: str) -> str:
    """Return the heading of a figure's column."""
    return HEADINGS.get(figure) or (example.RESULTS | example.BUDGET)[figure][0]


def rates_table(name: str, lines: Sequence[Line]) -> list[str]:
    """Return the table of the sampled accuracy of the rows of `RATED`, with a column for each learning rate."""
    cells = [f"{row} {rate:g}" for row in RATED for rate in RATES]
    tested = [line for line in lines if line["block"] == name and split_of(line) == TEST]
    of_block = [{**line, "arm": f"{line['row']} {rate_of(line):g}"} for line in tested]
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


def reported_lines(block: str, lines: Sequence[Line]) -> list[Line]:
    """Return the lines of a block that the tables show: of `SEEDS`, each row at the rate of `reported_rate`."""
    of_rows = [lines_at(block, row, reported_rate(block, row, lines), lines) for row in rows_of_block(block)]
    return [line for of_row in of_rows for line in of_row]


def reported_rate(block: str, row: str, lines: Sequence[Line]) -> float:
    """Return the rate that validation has chosen if every seed has run at it, else the rate of the recipe."""
    chosen = chosen_rate(block, row, lines)
    return chosen if chosen is not None and lines_at(block, row, chosen, lines) else RATE


def lines_at(block: str, row: str, rate: float, lines: Sequence[Line]) -> list[Line]:
    """Return the lines of a row of a block at a rate on the held-out problems; none unless each of `SEEDS` has one."""
    cells = [Cell(block, row, seed, rate) for seed in SEEDS]
    found = [line for cell in cells for line in lines if cell.is_of(line)]
    return found if len(found) == len(SEEDS) else []


def tuned_on(row: str, blocks: Iterable[str], lines: Sequence[Line]) -> str:
    """Return the learning rate of a row as text: that of each block in their order, "own" if nothing has chosen it."""

    def of_block(block: str) -> str:
        if row not in rows_of_block(block):
            return "none"
        rate = reported_rate(block, row, lines)
        return f"{rate:.0e}" if rate == chosen_rate(block, row, lines) else "own"

    rates = [of_block(block) for block in blocks]
    return "recipe's own rate" if {*rates} <= {"own", "none"} else ", ".join(rates)


def shown(figure: str, values: Sequence[float | None]) -> str:
    """Return the mean and the extremes of the seeds, or for tokens and seconds the mean as a whole number."""
    whole = [value for value in values if value is not None and figure in ("tokens", "cpu_seconds")]
    return f"{mean(whole):.0f}" if whole else spread(values)


if __name__ == "__main__":
    sys.exit(main())
