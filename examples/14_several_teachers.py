# Copyright (c) 2026 the megatron_selfdistill authors. Apache-2.0.
"""Several teachers: a specialist for each of two tasks, and one student that learns both from them without any hint.

The base is weak at subtractions and at additions.  Each specialist is the base after self-distillation on the problems
of its task alone, whose hints only its own teacher has seen.  The student starts from the base, too.  Its records name
the specialist of their task, and no prompt shows a solution: the student learns what the specialists know from their
distributions over its own responses.  For comparison, the base learns both tasks from the hints themselves.

    python examples/14_several_teachers.py
"""

from __future__ import annotations

import dataclasses
import sys
from collections.abc import Sequence
from pathlib import Path

from _lib import tables, two_tasks, variants
from _lib.command_line import console, example_parser, prepare_process
from _lib.measurement import measure
from _lib.pretraining import Base, prepared_base, write_records
from _lib.variants import Variant, train_variant

COLUMNS = [f"{name}, {kind}" for name in two_tasks.TASKS for kind in ("greedy", "sampled")]


def main(argv: Sequence[str] | None = None) -> int:
    """Run the example with the arguments of the command line; return the exit status."""
    options = example_parser(__doc__).parse_args(argv)
    prepare_process()
    base = prepared_base(two_tasks.TASK, options.seed, options.directory)
    directory = options.directory / "several_teachers" / f"seed{options.seed}"
    steps = () if options.steps is None else (f"num_steps={options.steps}",)

    def trained(title: str, names: Sequence[str], *settings: str) -> Path:
        """Return the run directory of a variant on the problems of the tasks ``names``."""
        problems = [record for name in names for record in two_tasks.problems_of(name, options.seed)]
        file = write_records(directory / f"{'_'.join(names)}.jsonl", problems)
        run_dir, _, _, _ = train_variant(Variant(title, settings).on(file, *steps), base, directory)
        return run_dir

    tasks = list(two_tasks.TASKS)
    specialists = {name: trained(f"Specialist of {name}", [name]) for name in tasks}
    teachers = [
        f"teachers.{name}={{load: {run_dir / 'checkpoints'}, hint: none}}" for name, run_dir in specialists.items()
    ]
    united = trained("One student of both specialists", tasks, *teachers)
    hinted = trained("Self-distillation on both tasks", tasks, *variants.SELF_DISTILLATION.overrides)
    rows: dict[str, Path | None] = {"base": None}
    rows |= {f"specialist of {name}": run_dir for name, run_dir in specialists.items()}
    rows |= {"student of both specialists": united, "self-distillation with hints": hinted}
    table = tables.new_table("Accuracy on held-out problems, without hints", COLUMNS)
    for title, run_dir in rows.items():
        table.add_row(title, *accuracies(base, run_dir, directory))
    console.print(table)
    return 0


def accuracies(base: Base, run_dir: Path | None, directory: Path) -> list[str]:
    """Return the cells of `COLUMNS` for the model of a run, or for the base itself."""
    cells = []
    for name, task in two_tasks.TASKS.items():
        held_out = write_records(directory / f"held_out_{name}.jsonl", task.held_out_problems())
        found = measure(dataclasses.replace(base, held_out=held_out), run_dir)
        cells += [f"{found.greedy:.3f}", f"{found.sampled:.3f}"]
    return cells


if __name__ == "__main__":
    sys.exit(main())
