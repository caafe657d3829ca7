# Copyright (c) 2026 the megatron_selfdistill authors. Apache-2.0.
"""A leaking hint: the model with the hint states right answers without work, and the model without it must not.

In a tenth of its pretraining texts without a hint, the base states an answer without work, which is mostly wrong; with
the hint it does so in 70 %, and the answer is right.  So the teacher rates a leak, which the student proposes by itself
now and then, higher than work.  The student can be right only by working.

Each variant is a target: the teacher alone, mixes with the current student, and anchored targets, which mix the teacher
with the reference, that is the base itself on the student's prompt.  A mix with the student moves with the student; an
anchored target stands still.  The variant Anchored is the default recipe.  The tables show the figures by step, so that
the best step of a variant can be compared with the last one.

    python examples/09_leaking_hint.py
    python examples/09_leaking_hint.py --steps 400 --forward     longer, and also under forward KL
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

from rich.table import Table

from _lib import leaking_subtraction, tables
from _lib.command_line import command, console, example_parser, prepare_process
from _lib.curves import ENTROPY, GREEDY, SAMPLED, plot_curves
from _lib.pretraining import Base, prepared_base, write_records
from _lib.variants import FORWARD_KL, STUDENT_MIX, STUDENT_MIX_STRICT, TEACHER_ALONE, Variant
from _lib.watched_runs import WITHOUT_GUARDS, Point, watch

ANCHORED = Variant("Anchored")
"""The default recipe: the mix with the frozen base, whose entropy is matched, with k <= 1 + w."""
ANCHORED_MEAN = Variant("Anchored, k = 1 + w", ("target=geometric_mean",))
ANCHORED_STRICT = Variant("Anchored, strict match", ("target=strict",))
VARIANTS = (TEACHER_ALONE, STUDENT_MIX, STUDENT_MIX_STRICT, ANCHORED_MEAN, ANCHORED, ANCHORED_STRICT)
NUM_STEPS = 200
FIGURES: dict[str, Callable[[Point], float | None]] = {
    "Greedy accuracy": lambda point: point.greedy,
    "Sampled accuracy": lambda point: point.sampled,
    "Share of samples that show their work": lambda point: point.shows_work,
    "Entropy in nats per token": lambda point: point.entropy,
}
Runs = Mapping[Variant, Sequence[Point]]


def main(argv: Sequence[str] | None = None) -> int:
    """Run the example with the arguments of the command line; return the exit status."""
    parser = example_parser(__doc__)
    parser.add_argument("--forward", action="store_true", help="also run both matched mixes under forward KL")
    options = parser.parse_args(argv)
    prepare_process()
    directory = options.directory / "leaking_hint" / f"seed{options.seed}"
    base = prepared_base(leaking_subtraction.TASK, options.seed, options.directory)
    problems = write_records(directory / "train.jsonl", leaking_subtraction.TASK.training_problems(options.seed))
    chosen = VARIANTS + (tuple(map(under_forward_kl, (STUDENT_MIX, ANCHORED))) if options.forward else ())
    steps = moments(options.steps or NUM_STEPS)
    runs = {variant: run(variant, base, problems, directory, steps) for variant in chosen}
    for title, figure in FIGURES.items():
        console.print(by_step(title, runs, figure))
    pictured = {variant.title: run_dir(variant, directory) for variant in chosen}
    title = f"A leaking hint, seed {options.seed}"
    curves = plot_curves(pictured, directory / "curves.png", (GREEDY, SAMPLED, ENTROPY), title)
    console.print(f"curves: {curves}\n", soft_wrap=True)
    console.print(conclusion(runs), soft_wrap=True)
    return 0


def under_forward_kl(variant: Variant) -> Variant:
    """Return the same variant under forward KL."""
    return Variant(f"{variant.title}, forward KL", (*variant.overrides, *FORWARD_KL.overrides))


def moments(num_steps: int) -> list[int]:
    """Return the steps at which every run is measured: the start, an eighth, a quarter, a half, and the end."""
    return sorted({0, *(num_steps // part for part in (8, 4, 2)), num_steps})


def run(variant: Variant, base: Base, problems: Path, directory: Path, steps: Sequence[int]) -> list[Point]:
    """Train a variant to the last of ``steps``, whatever becomes of it, and return its points."""
    console.rule(f"[bold]{variant.title}", align="left")
    unguarded = variant.on(problems, *WITHOUT_GUARDS)
    overrides = (*base.overrides, *unguarded.overrides, f"num_steps={steps[-1]}")
    by_hand = command((*overrides, f"run_dir={run_dir(variant, directory)}-by-hand"))
    console.print(by_hand, style="dim", markup=False, soft_wrap=True)
    return watch(unguarded, base, run_dir(variant, directory), steps)


def run_dir(variant: Variant, directory: Path) -> Path:
    """Return the run directory of a variant."""
    return directory / "".join(c if c.isalnum() else "_" for c in variant.title.lower())


def by_step(title: str, runs: Runs, figure: Callable[[Point], float | None]) -> Table:
    """Return a table of one figure with a row for each variant and a column for each step."""
    steps = [point.step for point in next(iter(runs.values()))]
    table = tables.new_table(title, [f"step {step}" for step in steps])
    for variant, points in runs.items():
        values = [figure(point) for point in points]
        table.add_row(variant.title, *("" if value is None else f"{value:.3f}" for value in values))
    return table


def conclusion(runs: Runs) -> str:
    """Return the sentences that interpret the measured points."""
    moving = [variant for variant in (TEACHER_ALONE, STUDENT_MIX, STUDENT_MIX_STRICT) if variant in runs]
    still = [variant for variant in (ANCHORED_MEAN, ANCHORED, ANCHORED_STRICT) if variant in runs]
    before = runs[moving[0]][0]
    lines = [
        f"Before training {before.sampled:.3f} of the samples are right and {before.shows_work:.2f} show their work."
    ]
    for name, group in (("the teacher alone and the mixes with the student", moving), ("the anchored targets", still)):
        work = [runs[variant][-1].shows_work for variant in group]
        right = [runs[variant][-1].sampled for variant in group]
        lines.append(
            f"At the end, {name} show work in {min(work):.2f} to {max(work):.2f} of the samples; "
            f"{min(right):.3f} to {max(right):.3f} are right."
        )
    best = max((point.sampled, point.step) for variant in moving for point in runs[variant])
    last = max(runs[variant][-1].sampled for variant in still)
    verdict = "is below" if best[0] < last else "is not below"
    lines.append(
        f"Early stopping is the competitor: the best step of a target that moves reaches {best[0]:.3f} (step "
        f"{best[1]}), which {verdict} the {last:.3f}\nof the best anchored target at its last step."
    )
    kept = max(still, key=lambda variant: runs[variant][-1].shows_work)
    lost = before.shows_work - runs[kept][-1].shows_work
    lines.append(
        f"{kept.title} keeps the most work: the share changes by {-lost:+.2f} over the run."
        if lost < 0.1
        else f"No target holds the leak back here: even {kept.title} loses {lost:.2f} of the work."
    )
    return "\n".join(lines)


if __name__ == "__main__":
    sys.exit(main())
