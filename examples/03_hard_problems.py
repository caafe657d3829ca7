# Copyright (c) 2026 the megatron_selfdistill authors. Apache-2.0.
"""Hard problems: two columns must borrow with a zero on top (300-004), and the base never answers correctly.

Self-distillation learns from wrong responses too, because the teacher scores every token.  Rejection fine-tuning with a
verifier learns only from right responses.  Only a few per cent of the responses are right at first, so rejection
fine-tuning starts slowly and catches up.  The student samples all responses by itself.  The teacher alone does as well
as the mix.

    python examples/03_hard_problems.py
"""

from __future__ import annotations

import dataclasses
import sys
from collections.abc import Sequence

from _lib import subtraction, tables, variants
from _lib.command_line import console, example_parser, prepare_process
from _lib.pretraining import prepared_base, write_records

VARIANTS = (
    variants.SELF_DISTILLATION,
    variants.STRICT,
    variants.TEACHER_ALONE,
    variants.FORWARD_KL,
    variants.REJECTION,
)
NUM_STEPS = 100


def main(argv: Sequence[str] | None = None) -> int:
    """Run the example with the arguments of the command line; return the exit status."""
    options = example_parser(__doc__).parse_args(argv)
    prepare_process()
    directory = options.directory / "hard_problems" / f"seed{options.seed}"
    base = prepared_base(subtraction, options.seed, options.directory)
    problems = write_records(directory / "train.jsonl", subtraction.hard_training_problems())
    held_out = write_records(directory / "held_out.jsonl", subtraction.hard_held_out_problems())
    base = dataclasses.replace(base, held_out=held_out)
    steps = options.steps or NUM_STEPS
    settings = (f"num_steps={steps}", "evaluation.num_samples=4")
    runs = [variant.on(problems, *settings) for variant in VARIANTS]
    before, outcomes = tables.compare("Two borrows from a zero", base, runs, directory)
    tables.show_transcripts(before, outcomes[0].measurement)
    moments = sorted({step for step in (25, 50, 75) if step < steps} | {0, steps})
    console.print(tables.accuracy_by_step("Greedy accuracy by step", outcomes, moments))
    console.print(
        f"Before training {before.greedy:.3f} of the greedy responses and {before.sampled:.3f} of the samples are "
        "right.\nAt first a verifier accepts almost nothing, so RFT starts slowly; the teacher's signal on every token "
        "teaches from the\nfirst step on.  The teacher alone learns these problems as well as the mix.",
        soft_wrap=True,
    )
    return 0


if __name__ == "__main__":
    sys.exit(main())
