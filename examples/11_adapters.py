# Copyright (c) 2026 the megatron_selfdistill authors. Apache-2.0.
"""Low-rank adapters: small factors learn beside frozen weights, which are the teacher and the reference, too.

The task and the base are those of 01_quickstart.py.  One run trains all weights; the others train adapters of rank 4
and 16 on all linear layers, at ten times the learning rate.  A run with adapters keeps no second copy of the weights,
and its checkpoint holds the factors and their optimizer state alone.  The frozen base stays where it is: commands that
read a checkpoint of adapters read the base, too.

    python examples/11_adapters.py
    python examples/11_adapters.py --ranks 1 64              other ranks
    python examples/11_adapters.py --learning-rate 9e-4      another learning rate of the adapters
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from rich.table import Table

from _lib import subtraction, tables
from _lib.command_line import console, example_parser, prepare_process
from _lib.curves import GREEDY, SAMPLED
from _lib.pretraining import prepared_base, write_records
from _lib.variants import Variant, train_variant
from megatron_selfdistill.metrics.run_log import read_metrics

ALL_WEIGHTS = Variant("All weights")
LEARNING_RATE = 3e-3
"""Ten times the learning rate with which the examples train all weights."""


@dataclass(frozen=True)
class Row:
    """What a run has reached on held-out problems without hints, and the bytes of its checkpoint."""

    title: str
    before: float
    greedy: float
    sampled: float
    checkpoint_bytes: int
    seconds: float


def main(argv: Sequence[str] | None = None) -> int:
    """Run the example with the arguments of the command line; return the exit status."""
    parser = example_parser(__doc__)
    parser.add_argument("--ranks", type=int, nargs="+", default=[4, 16], help="ranks of the adapters (default: 4 16)")
    parser.add_argument("--learning-rate", type=float, default=LEARNING_RATE, help="of the adapters (default: 0.003)")
    options = parser.parse_args(argv)
    prepare_process()
    directory = options.directory / "adapters" / f"seed{options.seed}"
    base = prepared_base(subtraction.TASK, options.seed, options.directory)
    problems = write_records(directory / "train.jsonl", subtraction.training_problems(options.seed))
    steps = () if options.steps is None else (f"num_steps={options.steps}",)
    rows = []
    for variant in (ALL_WEIGHTS, *(adapters(rank, options.learning_rate) for rank in options.ranks)):
        run_dir, _, seconds, _ = train_variant(variant.on(problems, *steps), base, directory)
        rows.append(row(variant.title, run_dir, seconds))
    console.print(table(rows))
    console.print(conclusion(rows), soft_wrap=True)
    return 0


def adapters(rank: int, learning_rate: float) -> Variant:
    """Return the default recipe with adapters of a rank."""
    return Variant(f"Adapters of rank {rank}", (f"adapter.rank={rank}", f"optimizer.lr={learning_rate:g}"))


def row(title: str, run_dir: Path, seconds: float) -> Row:
    """Return the row of a finished run, from its logged evaluations and its checkpoint."""
    evaluated = [line for line in read_metrics(run_dir) if GREEDY.key in line]
    files = (run_dir / "checkpoints").rglob("*")
    return Row(
        title=title,
        before=evaluated[0][SAMPLED.key],
        greedy=evaluated[-1][GREEDY.key],
        sampled=evaluated[-1][SAMPLED.key],
        checkpoint_bytes=sum(file.stat().st_size for file in files if file.is_file()),
        seconds=seconds,
    )


def table(rows: Sequence[Row]) -> Table:
    """Return the table of the rows."""
    found = tables.new_table("Adapters against all weights", ("greedy", "sampled", "checkpoint, MB", "seconds"))
    for one in rows:
        size = f"{one.checkpoint_bytes / 1e6:.2f}"
        found.add_row(one.title, f"{one.greedy:.3f}", f"{one.sampled:.3f}", size, f"{one.seconds:.0f}")
    return found


def conclusion(rows: Sequence[Row]) -> str:
    """Return the sentences that interpret the table; the first row trains all weights."""
    whole, *adapted = rows
    lines = [f"Before training {whole.before:.3f} of the samples are right."]
    for one in adapted:
        lines.append(
            f"{one.title}: {one.sampled:.3f}, {one.sampled - whole.sampled:+.3f} against all weights, with a "
            f"checkpoint of {one.checkpoint_bytes / whole.checkpoint_bytes:.0%} of the bytes."
        )
    return "\n".join(lines)


if __name__ == "__main__":
    sys.exit(main())
