# Copyright (c) 2026 the megatron_selfdistill authors. Apache-2.0.
"""Measure the rows of examples/10_recipes.py over seeds, and write the tables of docs/recipes/comparison.md.

A cell is one block, one row and one seed; its result is one line of docs/recipe_table.jsonl.  A cell whose line is
there is not run again, so that the script may stop at any time and go on later.  The row ``before`` is the base itself.

    python tools/benchmarks/recipe_table.py                         every missing cell
    python tools/benchmarks/recipe_table.py --blocks additions --rows default grpo --seeds 21
    python tools/benchmarks/recipe_table.py --tables                the tables of the page from the lines
    python tools/benchmarks/recipe_table.py --check                 the status is 1 where the page has other tables

A table stands between <!-- table BLOCK --> and <!-- end BLOCK --> in the page; BLOCK_budget is what the rows learn
from.  A table shows the seeds that have a line for every row.
"""

from __future__ import annotations

import argparse
import importlib
import json
import re
import shutil
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from statistics import mean
from typing import Any

from anchored_map import REPOSITORY, read_lines
from anchored_tables import complete, seeds_of, spread

from _lib.command_line import prepare_process
from _lib.measurement import measure
from _lib.pretraining import make_base, write_records

example = importlib.import_module("10_recipes")  # anchored_map has put examples/ on the path

LINES, PAGE = REPOSITORY / "docs" / "recipe_table.jsonl", REPOSITORY / "docs" / "recipes" / "comparison.md"
SEEDS = (21, 22, 23)
"""The seeds that are reported; no setting was chosen on them."""
BEFORE = "before"
ROWS = (BEFORE, *example.ROWS)
RESULTS = {
    "greedy": "greedy",
    "sampled": "sampled",
    "pass_at_8": "pass@8",
    "different": "different",
    "shows_work": "work",
    "entropy": "entropy",
    "sampled_at_quarter": "at step 25",
    "sampled_at_half": "at step 50",
}
BUDGET = {"trained": "trained", "with_hint": "with hint", "tokens": "tokens", "cpu_seconds": "seconds"}
"""Figure of a line -> heading of its column."""
ABSENT = {
    "subtraction": ("different",),
    "additions": ("shows_work",),
    "unsolved": ("different",),
    "calculator": ("different", "shows_work"),
}
"""The figures that say nothing in a block: one right text, or no work to show."""
Line = Mapping[str, Any]


def main(argv: Sequence[str] | None = None) -> int:
    """Run the missing cells seed by seed, or write or compare the page; return the exit status."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--blocks", nargs="+", choices=example.BLOCKS, default=list(example.BLOCKS))
    parser.add_argument("--rows", nargs="+", choices=ROWS, default=list(ROWS))
    parser.add_argument("--seeds", type=int, nargs="+", default=SEEDS, help=f"(default: {' '.join(map(str, SEEDS))})")
    parser.add_argument("--lines", type=Path, default=LINES, help="(default: docs/recipe_table.jsonl)")
    parser.add_argument("--directory", type=Path, default=Path("runs/recipe_table"), help="bases and runs")
    parser.add_argument("--tables", action="store_true", help="write the tables of the page and run nothing")
    parser.add_argument("--check", action="store_true", help="compare the tables of the page and run nothing")
    options = parser.parse_args(argv)
    lines = read_lines(options.lines)
    if options.tables or options.check:
        page = PAGE.read_text(encoding="utf-8")
        written = with_tables(page, lines)
        if options.tables:
            PAGE.write_text(written, encoding="utf-8")
        return int(options.check and written != page)
    done = {(line["block"], line["row"], line["seed"]) for line in lines}
    prepare_process()
    for seed in options.seeds:
        for block in options.blocks:
            for row in options.rows:
                if row in rows_in(block) and (block, row, seed) not in done:
                    run_cell(block, row, seed, options.lines, options.directory)
    return 0


def run_cell(name: str, row: str, seed: int, lines: Path, root: Path) -> None:
    """Run a cell, append its line, and remove its run; the base stays for the other cells."""
    line = {"block": name, "row": row, "seed": seed} | rounded(cell(name, row, seed, root))
    with lines.open("a", encoding="utf-8") as file:
        file.write(json.dumps(line) + "\n")
    shutil.rmtree(root / f"{name}-seed{seed}", ignore_errors=True)
    print(json.dumps(line), flush=True)


def cell(name: str, row: str, seed: int, root: Path) -> dict[str, Any]:
    """Return the figures of a cell, and its overrides without the directories of this machine."""
    block, directory = example.BLOCKS[name], root / f"{name}-seed{seed}"
    base = make_base(block.task, seed, root / "bases")
    if row == BEFORE:
        return dict(example.measured(measure(base, num_samples=block.num_measured)))
    problems = write_records(directory / "train.jsonl", block.task.training_problems(seed))
    outcome = example.run(row, block, base, problems, directory, example.NUM_STEPS)
    return {"overrides": list(example.overrides_of(row, block)), **example.figures(row, outcome)}


def rounded(figures: Mapping[str, Any]) -> dict[str, Any]:
    """Return the figures with at most four digits after the point, also in lists."""

    def short(value: Any) -> Any:
        return round(value, 4) if isinstance(value, float) else value

    return {
        name: [short(one) for one in value] if isinstance(value, list) else short(value)
        for name, value in figures.items()
    }


def with_tables(page: str, lines: Sequence[Line]) -> str:
    """Return the page with every table written anew from the lines."""

    def written(match: re.Match[str]) -> str:
        name, _, budget = match[1].partition("_")
        rows = (budget_table if budget else results_table)(name, lines)
        return "\n".join([f"<!-- table {match[1]} -->", *rows, f"<!-- end {match[1]} -->"])

    return re.sub(r"<!-- table (\w+) -->.*?<!-- end \1 -->", written, page, flags=re.DOTALL)


def results_table(name: str, lines: Sequence[Line]) -> list[str]:
    """Return the table of what the rows of a block have reached, a row for each recipe.

    Each cell is the mean over the seeds, with the lowest and the highest seed in brackets.
    """
    found = lines_of(name, lines)
    figures = {figure: heading for figure, heading in RESULTS.items() if figure not in ABSENT[name]}
    return rows_of(found, figures, f"step {example.NUM_STEPS}, {seeds_of(found)}", rows_in(name))


def budget_table(name: str, lines: Sequence[Line]) -> list[str]:
    """Return the table of what the rows of a block learn from, and what they cost."""
    found = lines_of(name, lines)
    return rows_of(found, BUDGET, seeds_of(found), rows_in(name)[1:], shows_row=True)


def rows_in(name: str) -> tuple[str, ...]:
    """Return the rows of a block, of which the first is the base itself."""
    return (BEFORE, *example.BLOCKS[name].rows)


def lines_of(name: str, lines: Sequence[Line]) -> list[Line]:
    """Return the lines of a block, of the seeds that have a line for each row."""
    return complete([{**line, "arm": line["row"]} for line in lines if line["block"] == name], rows_in(name))


def rows_of(
    lines: Sequence[Line], figures: Mapping[str, str], corner: str, names: Sequence[str], *, shows_row: bool = False
) -> list[str]:
    """Return a table of ``figures`` with a row for each of ``names``; ``shows_row``: with what the row learns from."""
    if not lines:
        return ["No seed has a line for every row yet."]
    described = ["teacher sees", "responses per step"] if shows_row else []
    headings = [corner, *described, *figures.values()]
    table = [f"| {' | '.join(headings)} |", "|---" * len(headings) + "|"]
    for name in names:
        of_row = [line for line in lines if line["row"] == name]
        row = example.ROWS.get(name)
        about = [row.sees, row.budget] if row is not None and shows_row else []
        cells = [shown(figure, [line.get(figure) for line in of_row]) for figure in figures]
        table.append(f"| {' | '.join([BEFORE if row is None else row.title, *about, *cells])} |")
    return table


def shown(figure: str, values: Sequence[float | None]) -> str:
    """Return the mean and the extremes of the seeds, or for tokens and seconds the mean as a whole number."""
    whole = [value for value in values if value is not None and figure in ("tokens", "cpu_seconds")]
    return f"{mean(whole):.0f}" if whole else spread(values)


if __name__ == "__main__":
    sys.exit(main())
