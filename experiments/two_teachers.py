# Copyright (c) 2026 the megatron_selfdistill authors. Apache-2.0.
"""Measure what two specialists teach one student, on the problems of examples/_lib/two_tasks.py.

Each specialist is the base after 150 steps of self-distillation on the problems of its task, with answers as hints, so
that it is good at one task and not at the other.  The student starts from the base, which is the average of both
starts.  It learns from 32 problems of both tasks in a step, and the teachers see no hints.  A cell is one arm and one
seed; its result is one line of results/two_teachers.jsonl, and a cell whose line is there is not run again.

    python experiments/two_teachers.py               every missing cell
    python experiments/two_teachers.py --tables      the table of docs/teachers.md from the lines
    python experiments/two_teachers.py --check       the status is 1 if the page has another one
"""

from __future__ import annotations

import argparse
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from itertools import product
from pathlib import Path
from statistics import mean
from typing import TYPE_CHECKING

from cell_lines import DOCS, REPOSITORY, RESULTS, Line, append_line, read_lines
from page_tables import complete, seeds_of, spread, write_or_compare

sys.path[:0] = [str(REPOSITORY / "examples")]

from _lib import two_tasks  # noqa: E402
from _lib.command_line import prepare_process  # noqa: E402
from _lib.pretraining import make_base, write_records  # noqa: E402
from _lib.task import Record  # noqa: E402
from _lib.variants import Variant  # noqa: E402
from _lib.watched_runs import WITHOUT_GUARDS, watch  # noqa: E402

if TYPE_CHECKING:  # torch and Megatron are imported by the functions that need them, so that --help answers at once
    from megatron_selfdistill.evaluation.evaluation_result import Transcript
    from megatron_selfdistill.trainer import Trainer

LINES, PAGE = RESULTS / "two_teachers.jsonl", DOCS / "teachers.md"
SEEDS = (11, 12, 13, 14, 15)
NUM_STEPS = 150
FIRST, SECOND = TASKS = ("subtraction", "additions")
"""The names of both tasks, and of their specialists."""
LABELS = {
    "base": "before: the student's start",
    FIRST: f"specialist of {FIRST}",
    SECOND: f"specialist of {SECOND}",
    "two_teachers": "two teachers, each alone in the target of its records",
    "two_teachers_anchored": "two teachers, each mixed with the student's start (w = 2)",
    "one_teacher": f"ablation: the specialist of {FIRST} for all records",
    "mixed_up": "ablation: each record has the other specialist",
    "sequential": f"the specialist of {FIRST}, then 150 steps on {SECOND}",
    "merged": "average of the weights of both specialists",
}
"""Name of an arm, in the order in which arms need each other -> its label in the table."""


def main(argv: Sequence[str] | None = None) -> int:
    """Run the missing cells seed by seed, or write or compare the table; return the exit status."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", type=int, nargs="+", default=SEEDS, help=f"(default: {' '.join(map(str, SEEDS))})")
    parser.add_argument("--lines", type=Path, default=LINES, help="(default: experiments/results/two_teachers.jsonl)")
    parser.add_argument("--directory", type=Path, default=Path("runs/two_teachers"), help="bases and runs")
    parser.add_argument("--tables", action="store_true", help="write the table of the page and run nothing")
    parser.add_argument("--check", action="store_true", help="write nothing; the status is 1 if the table differs")
    options = parser.parse_args(argv)
    if options.tables or options.check:
        return write_or_compare(PAGE, rows_of=lambda name: table(read_lines(LINES)), compare=options.check)
    prepare_process()
    for seed, arm in product(options.seeds, LABELS):
        if not any((line["arm"], line["seed"]) == (arm, seed) for line in read_lines(options.lines)):
            run_cell(arm, seed, options.lines, options.directory)
    return 0


def run_cell(arm: str, seed: int, lines: Path, root: Path) -> None:
    """Run a cell and append its line; the checkpoints of base and specialists stay for the other cells."""
    began, run_dir = time.perf_counter(), root / f"{arm}-seed{seed}"
    base = make_base(two_tasks.TASK, seed, root / "bases")
    specialists = {name: root / f"{name}-seed{seed}" / "checkpoints" for name in TASKS}
    problems = {
        name: write_records(root / f"{name}-seed{seed}.jsonl", records)
        for name, records in problems_of_arms(seed).items()
    }
    overrides, at_end, steps = arm_of(arm, problems, specialists)
    variant = Variant(arm, (*overrides, f"seed={seed}", *WITHOUT_GUARDS))
    at_the_end: list[Mapping[str, float]] = []

    def finish(trainer: Trainer) -> None:
        if at_end is not None:
            at_end(trainer)
            at_the_end.append(figures_of(trainer.evaluate(num_transcripts=None).transcripts))

    points = watch(variant, base, run_dir, (steps,), num_samples=8, further=figures_of, at_end=finish)
    figures = at_the_end[0] if arm == "merged" else points[-1].further
    shown = {name: round(value, 4) for name, value in figures.items()}
    line = {"arm": arm, "seed": seed} | shown | {"seconds": round(time.perf_counter() - began, 1)}
    append_line(lines, line, root / "none" if arm in TASKS else run_dir)


def problems_of_arms(seed: int) -> dict[str, list[Record]]:
    """Return the training problems of each task, and of both with the specialists, with one of them, or mixed up."""
    of_tasks = {name: two_tasks.problems_of(name, seed) for name in TASKS}
    both, other = [it for records in of_tasks.values() for it in records], {FIRST: SECOND, SECOND: FIRST}
    mixed_up = [it | {"teacher": other[it["teacher"]]} for it in both]
    one_teacher = [it | {"teacher": FIRST} for it in both]
    return {**of_tasks, "both": both, "one_teacher": one_teacher, "mixed_up": mixed_up}


Prepared = tuple[tuple[str, ...], "Callable[[Trainer], None] | None", int]


def arm_of(arm: str, problems: Mapping[str, Path], specialists: Mapping[str, Path]) -> Prepared:
    """Return the overrides of an arm, what it does with the trainer at its end, and its steps."""
    teachers = tuple(f"teachers.{name}={{load: {path}, hint: none}}" for name, path in specialists.items())
    alone = ("target=teacher_alone",)
    if arm == "base":
        return (f"data.path={problems['both']}",), None, 0
    if arm in TASKS:
        return (f"data.path={problems[arm]}",), lambda trainer: trainer.save(), NUM_STEPS
    if arm == "merged":
        load = f"checkpoint.load={specialists[FIRST]}"
        return (f"data.path={problems[FIRST]}", load), lambda trainer: average(trainer, specialists[SECOND]), 0
    if arm == "sequential":
        return (f"data.path={problems[SECOND]}", f"checkpoint.load={specialists[FIRST]}"), None, NUM_STEPS
    if arm == "one_teacher":
        return (f"data.path={problems[arm]}", teachers[0], *alone), None, NUM_STEPS
    target = ("target.teacher_weight=2",) if arm == "two_teachers_anchored" else alone
    named = problems["mixed_up" if arm == "mixed_up" else "both"]
    return (f"data.path={named}", *teachers, *target), None, NUM_STEPS


def average(trainer: Trainer, checkpoint: Path) -> None:
    """Set the model's weights to their average with those of ``checkpoint``."""
    import torch

    from megatron_selfdistill.checkpoint.external import load_weights
    from megatron_selfdistill.model.forward import unwrapped

    chunks = trainer.learner.chunks
    ours = [p.detach().clone() for chunk in chunks for p in unwrapped(chunk).parameters()]
    load_weights(checkpoint, chunks, trainer.run_data.vocab_size)
    with torch.no_grad():
        for mine, parameter in zip(ours, (p for chunk in chunks for p in unwrapped(chunk).parameters()), strict=True):
            parameter.lerp_(mine, 0.5)


def figures_of(responses: Sequence[Transcript]) -> Mapping[str, float]:
    """Return the sampled accuracy in each task; the names of additions have an equals sign."""
    samples = [it for it in responses if it.sample is not None]
    return {name: mean(it.correct for it in samples if ("=" in it.problem_id) == (name == SECOND)) for name in TASKS}


def table(lines: Sequence[Line]) -> list[str]:
    """Return the rows of the table, of the seeds that have every arm."""
    found = complete(lines, LABELS)
    rows = [f"| {seeds_of(found)}; sampled accuracy | {' | '.join(TASKS)} |", "|---" * (1 + len(TASKS)) + "|"]
    for arm, label in LABELS.items():
        cells = [spread([line[name] for line in found if line["arm"] == arm]) for name in TASKS]
        rows.append(f"| {label} | {' | '.join(cells)} |")
    return rows


if __name__ == "__main__":
    sys.exit(main())
