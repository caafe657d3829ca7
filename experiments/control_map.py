# Copyright (c) 2026 the megatron_selfdistill authors. Apache-2.0.
"""Measure targets with controls: the hints of other problems as the comparison of the teacher.

This text was written before the first run of these cells.  One run had been made before, to see that the program works:
a leaking hint, seed 5, which is none of the seeds below.

Tasks: the eleven small tasks of anchored_map.py whose losses docs/real_model.md compares.

Choosing the setting, on seeds 1 and 2 and on the tasks of `CHOOSING_TASKS`: the arms of `CHOICES`, one value changed at
a time from K = 4, w = .75 and the student as the anchor.  The setting with the greatest mean of the sampled accuracy
after the last step is taken; settings within .005 of it are ties, of which the cheapest is taken (the least K, then w =
.75).  The learning rate is the best of 1e-4, 3e-4 and 1e-3 by the same mean, for this setting and for each of the three
fixed targets by itself.

Shares of the reference in the anchor, .1 and .2, with K = 2, the best number where the student is the anchor: on the
same seeds and tasks, written before their first run.

One control with a share of .1, the cheapest of all, since one control costs a fifth of a step and two cost half of one:
on the choosing seeds and on the first three of the seeds of the comparison, written before its first run.  It takes the
place of two controls if its mean loss on the compared tasks is at most .01 greater.  On the choosing seeds it was .03
greater, and the comparison was stopped after three cells.

Comparing, on seeds 11 to 15 and on all tasks: the setting that the stage above has chosen, K = 4 with the reference as
the anchor; the best one whose anchor is the student, K = 2; the same with a share of .1 of the reference, which entered
this stage, before its first run here, when it had proved best on the choosing seeds (after thirteen of the twenty cells
of both shares); *own hint*, whose controls show the problem's own hint, so that it must learn nothing; another
problem's hint in the place of the teacher's; and the rivals of control_rivals.py.  The default, the mix with the
student and the teacher alone have their lines in results/anchored_map.jsonl.

The fixed targets again, on the later bases of the rivals, after these runs had begun: on problems that the base never
solves a target begins to learn late, if at all, and the bases of one seed differ between machines.  (Six first runs of
the trust region are gone: its patch had reached the pretraining of their bases, which had learnt nothing.)

Own hint with an epsilon of Adam of 1e-5 in the place of 1e-8, on the first three seeds and two tasks, written after
runs with their own hint had lost accuracy while their loss was 2e-15 nats and the norm of their gradient 5e-8: the
gradient is rounding, and Adam divides it by its own size, unless epsilon is larger.  If this is the cause, nothing
changes.

Longer than it takes, written before its first run: four times the steps on `LONG_TASKS`, on the first three seeds, with
the student as the anchor and with a share of .1 of the reference.  Where the student is the anchor, t - c is a constant
reward and only the match of entropies holds the target, so that a run may go on past its best.  The lines have ten
points, and control/general and control/specific at each, for a guard: is the specific news large while the accuracy
falls?

Rule for the default of the configuration, over these tasks and those of a real model: the setting with the smallest
mean loss whose worst loss is at most .15, where the loss is the sampled accuracy of the best arm on the task minus that
of the setting; ties go to the cheaper.  *auto* counts as one setting: it chooses by the data alone, the student with
controls where the solutions differ, the mix with the student where all hints are one text, and the default of today
where there are no solutions of the data (chat logs).

    python experiments/control_map.py --choose              the missing cells that choose the setting
    python experiments/control_map.py --arms controls       the missing cells of an arm, on the seeds that are reported
    python experiments/control_map.py --long                the missing cells of four times the steps
"""

from __future__ import annotations

import argparse
import contextlib
import dataclasses
import sys
from collections.abc import Mapping, Sequence
from itertools import product
from pathlib import Path

from cell_lines import REPOSITORY, read_lines

sys.path[:0] = [str(REPOSITORY / "examples")]

from anchored_experiments import EXPERIMENTS, SEEDS, SIX, Cell, Figures, columns  # noqa: E402
from anchored_map import run_cell  # noqa: E402
from control_rivals import PATCHES  # noqa: E402
from control_tables import AGAIN, CHOOSING_TASKS, FIXED_TARGETS, LINES, LONG, OF_LONG_RUNS, TIMES  # noqa: E402

from _lib.command_line import prepare_process  # noqa: E402
from _lib.pretraining import Base  # noqa: E402
from _lib.variants import Variant  # noqa: E402
from _lib.watched_runs import watch  # noqa: E402

TASKS = (*CHOOSING_TASKS, "unsolved", "unsolved_leaking", "unsolved_wrong", "choosing", "choosing_surer")
"""The small tasks whose teacher sees solutions of the data; on chat logs the setting auto is the default of today."""
OF_STUDENT = (*SIX["student_matched"], "target.control=other")


def setting(num_controls: int, weight: float, *more: str) -> tuple[str, ...]:
    """Return the overrides of a target with controls."""
    return (*OF_STUDENT, f"target.num_controls={num_controls}", f"target.teacher_weight={weight}", *more)


RATES = {"1e-4": ("optimizer.lr=1e-4",), "1e-3": ("optimizer.lr=1e-3",)}
FIXED = {name: SIX[name] for name in FIXED_TARGETS}
CHOICES: Mapping[str, Sequence[str]] = {
    "k1": setting(1, 0.75),
    "k2": setting(2, 0.75),
    "k4": setting(4, 0.75),
    "k8": setting(8, 0.75),
    "w050": setting(4, 0.5),
    "w150": setting(4, 1.5),
    "reference": setting(4, 0.75, "target.anchor=reference"),
    **FIXED,
    **{f"{name}_{rate}": (*FIXED[name], *lr) for name in FIXED for rate, lr in RATES.items()},
    **{f"k4_{rate}": (*setting(4, 0.75), *lr) for rate, lr in RATES.items()},
    **{f"share_{share}": setting(2, 0.75, f"target.anchor={share}") for share in (0.1, 0.2)},
    "share_0.1_k1": setting(1, 0.75, "target.anchor=0.1"),
}
ARMS: Mapping[str, Sequence[str]] = {
    "controls": setting(4, 0.75, "target.anchor=reference"),
    "controls_of_student": setting(2, 0.75),
    "controls_with_share": setting(2, 0.75, "target.anchor=0.1"),
    "one_control_with_share": setting(1, 0.75, "target.anchor=0.1"),
    "controls_own_hint": setting(2, 0.75),
    "controls_own_hint_eps": setting(2, 0.75, "optimizer.constants.adam_eps=1e-5"),
    "controls_other_hint": setting(2, 0.75, "data.solutions=other"),
    "topd": (*SIX["teacher_alone"], "loss.fused=none"),
    "trust_region": SIX["teacher_alone"],
    **{f"{name}{AGAIN}": SIX[name] for name in FIXED_TARGETS},
}
"""The arms that are reported; the numbers are those that `CHOICES` has chosen."""
LONG_TASKS = ("leak", "quickstart", "many_answers")
NEWS = ("control/general", "control/specific")
"""The metrics of the lines of long runs."""


def measured_long(variant: Variant, base: Base, run_dir: Path, steps: Sequence[int]) -> Figures:
    """Train and measure a run; return its columns, with `NEWS` as they were measured last before each point."""
    points = columns(watch(variant, base, run_dir, steps, num_samples=2))
    measured = [line for line in read_lines(run_dir / "metrics.jsonl") if NEWS[0] in line]
    latest = [[line for line in measured if line["step"] <= step][-1] for step in steps]
    return points | {key: [round(line[key], 5) for line in latest] for key in NEWS}


def long_cell(task: str, arm: str, seed: int) -> Cell:
    """Return the cell of a run of `TIMES` the steps of its task, which is measured ten times."""
    experiment = EXPERIMENTS[task]
    last = TIMES * experiment.steps[-1]
    steps = tuple(last * tenth // 10 for tenth in range(1, 11))
    longer = dataclasses.replace(experiment, name=task + LONG, steps=steps, arms=ARMS, measure=measured_long)
    return Cell(longer, arm, seed)


def main(argv: Sequence[str] | None = None) -> int:
    """Run the missing cells, seed by seed; return the exit status."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--choose", action="store_true", help="the cells that choose the setting")
    parser.add_argument("--long", action="store_true", help=f"the cells of {TIMES} times the steps")
    parser.add_argument("--arms", nargs="+", help="names of arms (default: all)")
    parser.add_argument("--tasks", nargs="+", choices=TASKS, help="(default: all)")
    parser.add_argument(
        "--seeds", type=int, nargs="+", help="(default: 11 12 13 14 15; with --choose 1 2, with --long 11 12 13)"
    )
    parser.add_argument("--lines", type=Path, default=LINES, help="(default: experiments/results/control_map.jsonl)")
    parser.add_argument("--directory", type=Path, default=Path("runs/control_map"), help="bases and runs")
    options = parser.parse_args(argv)
    arms, seeds = (CHOICES, (1, 2)) if options.choose else (ARMS, SEEDS[:3] if options.long else SEEDS)
    seeds = options.seeds or seeds
    done = {(line["experiment"], line["arm"], line["seed"]) for line in read_lines(options.lines)}
    prepare_process()
    if options.long:
        for seed, arm, task in product(seeds, options.arms or OF_LONG_RUNS, options.tasks or LONG_TASKS):
            if (task + LONG, arm, seed) not in done:
                run_cell(long_cell(task, arm, seed), options.lines, options.directory)
        return 0
    for seed in seeds:
        for arm in options.arms or arms:
            for task in options.tasks or (CHOOSING_TASKS if options.choose else TASKS):
                if (task, arm, seed) not in done:
                    experiment = dataclasses.replace(EXPERIMENTS[task], arms=arms)
                    cell = Cell(experiment, arm, seed, PATCHES.get(arm, contextlib.nullcontext))
                    run_cell(cell, options.lines, options.directory)
    return 0


if __name__ == "__main__":
    sys.exit(main())
