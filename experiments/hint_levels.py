# Copyright (c) 2026 the megatron_selfdistill authors. Apache-2.0.
"""Measure hint levels before training, train with each of them, and write the tables of docs/evaluation.md.

A cell is one task, one seed, and one level under one target; its result is one line of results/hint_levels.jsonl.  The
cell ``measured`` has the numbers of all levels, from the base.  A cell whose line is there is not run again.

    python experiments/hint_levels.py             every missing cell
    python experiments/hint_levels.py --tables    the tables of the page from the lines
    python experiments/hint_levels.py --check     the status is 1 if the page has other tables

Table TASK has the numbers and the accuracies of the levels of a task, and table ranks how well each number ranks the
levels as training does: Spearman's coefficient over the levels of a seed.
"""

from __future__ import annotations

import argparse
import random
import sys
import time
from collections.abc import Callable, Sequence
from itertools import product
from pathlib import Path
from statistics import mean
from typing import Any

from cell_lines import DOCS, REPOSITORY, RESULTS, Line, append_line, read_lines
from page_tables import markdown, spread, write_or_compare

sys.path[:0] = [str(REPOSITORY / "examples")]

from _lib import additions, subtraction  # noqa: E402
from _lib.command_line import CONFIG_NAME, prepare_process  # noqa: E402
from _lib.pretraining import Base, make_base, write_records  # noqa: E402
from _lib.task import Record, Task  # noqa: E402
from _lib.variants import Variant  # noqa: E402
from _lib.watched_runs import WITHOUT_GUARDS, watch  # noqa: E402

LINES, PAGE = RESULTS / "hint_levels.jsonl", DOCS / "evaluation.md"
SEEDS = (31, 32, 33)
NUM_STEPS = 100
MEASURED = "measured"
LEVELS = ("none", "other", "digits", "noisy", "answer", "solution")
"""The levels: ablations, a part of the answer, answers of which 60 % are wrong, the answer, and the worked solution.
In additions the answer is the sum itself, which the problem states, and the solution is one right answer."""
TARGETS = {"default": (), "teacher_alone": ("target=teacher_alone",)}
NUMBERS = ("utility", "divergence", "contrast", "gain")


def of_subtraction(record: Record, rng: random.Random) -> Record:
    """Return the record of a subtraction with a column for each level."""
    a, b = map(int, record["id"].split("-"))
    right = record["answer"]
    noisy = subtraction.with_one_wrong_digit(right, rng) if rng.random() < 0.6 else right
    return record | {"solution": subtraction.work(a, b)[:-1], "noisy": noisy, "digits": right[-1]}


def of_additions(record: Record, rng: random.Random) -> Record:
    """Return the record of an addition with a column for each level."""
    right = record["solution"]
    noisy = additions.off_by_one(right, rng) if rng.random() < 0.6 else right
    return record | {"noisy": noisy, "digits": right[:2]}


TASKS: dict[str, tuple[Task, Callable[[Record, random.Random], Record]]] = {
    "subtraction": (subtraction.TASK, of_subtraction),
    "additions": (additions.TASK, of_additions),
}


def main(argv: Sequence[str] | None = None) -> int:
    """Run the missing cells seed by seed; return the exit status."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tasks", nargs="+", choices=TASKS, default=list(TASKS))
    parser.add_argument("--seeds", type=int, nargs="+", default=SEEDS, help=f"(default: {' '.join(map(str, SEEDS))})")
    parser.add_argument("--lines", type=Path, default=LINES, help="(default: experiments/results/hint_levels.jsonl)")
    parser.add_argument("--directory", type=Path, default=Path("runs/hint_levels"), help="bases and runs")
    parser.add_argument("--tables", action="store_true", help="write the tables of the page, and run nothing")
    parser.add_argument("--check", action="store_true", help="compare the tables of the page and run nothing")
    options = parser.parse_args(argv)
    if options.tables or options.check:
        lines = read_lines(options.lines)
        return write_or_compare(PAGE, rows_of=lambda name: table_of(name, lines), compare=options.check)
    prepare_process()
    arms = [(MEASURED, ""), *product(LEVELS, TARGETS)]
    for seed, task, (level, target) in product(options.seeds, options.tasks, arms):
        name = {"task": task, "seed": seed, "level": level, "target": target}
        if not any(name.items() <= line.items() for line in read_lines(options.lines)):
            run_cell(name, options.lines, options.directory)
    return 0


def run_cell(name: dict[str, Any], lines: Path, root: Path) -> None:
    """Run a cell, append its line, and remove its run; the base stays for the other cells."""
    began = time.perf_counter()
    task, with_columns = TASKS[name["task"]]
    base = make_base(task, name["seed"], root / "bases")
    rng = random.Random(name["seed"])
    records = [with_columns(record, rng) for record in task.training_problems(name["seed"])]
    directory = root / "-".join(map(str, name.values()))
    problems = write_records(directory / "train.jsonl", records)
    held_out = write_records(directory / "held_out.jsonl", [with_columns(it, rng) for it in task.held_out_problems()])
    if name["level"] == MEASURED:
        found: dict[str, Any] = {"levels": measured(base, problems)}
    else:
        overrides = (*level_overrides(name["level"]), *TARGETS[name["target"]], *WITHOUT_GUARDS)
        variant = Variant(
            "level", (f"data.path={problems}", f"evaluation.path={held_out}", f"seed={name['seed']}", *overrides)
        )
        *_, last = watch(variant, base, directory / "run", [NUM_STEPS])
        found = {"overrides": list(overrides), "greedy": round(last.greedy, 4), "sampled": round(last.sampled, 4)}
    append_line(lines, name | found | {"seconds": round(time.perf_counter() - began, 1)}, directory)


def level_overrides(level: str) -> tuple[str, ...]:
    """Return the overrides of a run whose teacher sees the hints of a level."""
    if level in ("noisy", "digits"):
        return (f"data.fields.solution={level}",)
    return (f"data.solutions={'given' if level == 'solution' else level}",)


def measured(base: Base, problems: Path) -> list[dict[str, Any]]:
    """Return the numbers of all levels from the base."""
    from hint_level_numbers import at_level, measure_hint_levels

    from megatron_selfdistill import config as configuration
    from megatron_selfdistill.data.run_data import RunData
    from megatron_selfdistill.distributed import ranks
    from megatron_selfdistill.evaluation.inference import open_inference
    from megatron_selfdistill.evaluation.verify import load_verifier

    config = configuration.load([*base.overrides, f"evaluation.path={problems}"], CONFIG_NAME)
    levels = {name: RunData.load_evaluation(at_level(config, name), True) for name in LEVELS}
    grid = ranks.initialize(config.parallel, config.seed)
    try:
        with open_inference(config, levels[LEVELS[0]], grid) as inference:
            verifier = load_verifier(config.evaluation.verifier)
            found = measure_hint_levels(inference, config, levels, verifier, grid)
    finally:
        ranks.shutdown()
    return [
        {key: round(value, 4) if isinstance(value, float) else value for key, value in vars(it).items()} for it in found
    ]


# -- the tables of the page -----------------------------------------------------------------------------------------


def table_of(name: str, lines: Sequence[Line]) -> list[str]:
    """Return the rows of the table ``name`` of the page."""
    return table_of_ranks(lines) if name == "ranks" else table_of_task(name, lines)


def table_of_task(task: str, lines: Sequence[Line]) -> list[str]:
    """Return a row for each level of a task: the numbers of the base and the accuracies after training."""
    rows = [["hint", *NUMBERS, *(f"sampled after training, {target}" for target in TARGETS)], ["---"] * 7]
    for level in LEVELS:
        numbers = [of_level(line, level) for line in lines if (line["task"], line["level"]) == (task, MEASURED)]
        shown = [f"{mean(it[number] or 0 for it in numbers):+.3f}" if numbers else "" for number in NUMBERS]
        rows.append([level, *shown, *(spread(accuracies(lines, task, level, target)) for target in TARGETS)])
    before = [of_level(line, LEVELS[0]) for line in lines if (line["task"], line["level"]) == (task, MEASURED)]
    rows.append(["before", "", "", "", "", *[spread([it["accuracy"] for it in before])] * 2])
    return markdown(rows)


def of_level(line: Line, level: str) -> dict[str, Any]:
    """Return the numbers of a level in a line of the cell ``measured``."""
    return next(it for it in line["levels"] if it["name"] == level)


def accuracies(lines: Sequence[Line], task: str, level: str, target: str) -> list[float]:
    """Return the sampled accuracy after training of each seed."""
    wanted = {"task": task, "level": level, "target": target}
    return [line["sampled"] for line in lines if wanted.items() <= line.items()]


def table_of_ranks(lines: Sequence[Line]) -> list[str]:
    """Return a row for each task and target: Spearman's coefficient of each number with the accuracy after training."""
    rows = [["task", "target", *NUMBERS], ["---"] * (2 + len(NUMBERS))]
    for task, target in product(TASKS, TARGETS):
        of_number: dict[str, list[float]] = {number: [] for number in NUMBERS}
        for line in (line for line in lines if (line["task"], line["level"]) == (task, MEASURED)):
            of_seed = [other for other in lines if other["seed"] == line["seed"]]
            after = [accuracies(of_seed, task, level, target) for level in LEVELS]
            if all(after):
                for number in NUMBERS:
                    before = [of_level(line, level)[number] or 0 for level in LEVELS]
                    of_number[number].append(spearman(before, [it for (it,) in after]))
        rows.append([task, target, *(signed_spread(of_number[number]) for number in NUMBERS)])
    return markdown(rows)


def signed_spread(values: Sequence[float]) -> str:
    """Return the mean of the seeds with the lowest and the highest in brackets, with signs."""
    return f"{mean(values):+.2f} [{min(values):+.2f} {max(values):+.2f}]" if values else ""


def spearman(a: Sequence[float], b: Sequence[float]) -> float:
    """Return Spearman's rank correlation; equal values have their mean rank, and 0 stands for a constant."""

    def ranks(values: Sequence[float]) -> list[float]:
        return [sum(it < value for it in values) + (sum(it == value for it in values) - 1) / 2 for value in values]

    x, y = ranks(a), ranks(b)
    centre = (len(x) - 1) / 2
    spreads = [sum((it - centre) ** 2 for it in of) for of in (x, y)]
    if not all(spreads):
        return 0.0
    covariance = sum((p - centre) * (q - centre) for p, q in zip(x, y, strict=True))
    return float(covariance / (spreads[0] * spreads[1]) ** 0.5)


if __name__ == "__main__":
    sys.exit(main())
