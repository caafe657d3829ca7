# Copyright (c) 2026 the megatron_selfdistill authors. Apache-2.0.
"""Variable widths: numbers have two to four digits, and a hint is an answer or a whole worked solution.

The recipe is that of the quickstart; nothing in it needs texts of one length.  The teacher alone does at least as
well as the mix here too, and so does rejection fine-tuning with a verifier.

    python examples/05_variable_widths.py
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from statistics import mean

from _lib import ragged_subtraction, tables, variants
from _lib.command_line import console, example_parser, prepare_process
from _lib.pretraining import prepared_base, write_records
from megatron_selfdistill.metrics.run_log import read_metrics

VARIANTS = (variants.SELF_DISTILLATION, variants.TEACHER_ALONE, variants.REJECTION)


def main(argv: Sequence[str] | None = None) -> int:
    """Run the example with the arguments of the command line; return the exit status."""
    parser = example_parser(__doc__)
    parser.add_argument("--only", action="store_true", help="run self-distillation alone, without baselines")
    options = parser.parse_args(argv)
    prepare_process()
    directory = options.directory / "variable_widths" / f"seed{options.seed}"
    base = prepared_base(ragged_subtraction.TASK, options.seed, options.directory)
    records = ragged_subtraction.training_problems(options.seed)
    problems = write_records(directory / "train.jsonl", records)
    for name in ("problem", "solution"):
        lengths = [len(record[name]) for record in records]
        console.print(f"{name}s of {min(lengths)} to {max(lengths)} tokens, {mean(lengths):.1f} on average")
    steps = () if options.steps is None else (f"num_steps={options.steps}",)
    runs = [variant.on(problems, *steps) for variant in (VARIANTS[:1] if options.only else VARIANTS)]
    before, outcomes = tables.compare("Subtraction of two to four digits", base, runs, directory)
    tables.show_transcripts(before, outcomes[0].measurement, count=6)
    logged = [line for line in read_metrics(outcomes[0].run_dir) if "padding/teacher" in line]
    shares = [mean(line[f"padding/{role}"] for line in logged) for role in ("student", "teacher")]
    console.print(f"padding of packed sequences: student {shares[0]:.1%}, teacher {shares[1]:.1%}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
