# Copyright (c) 2026 the megatron_selfdistill authors. Apache-2.0.
"""Hard problems: two columns must borrow with a zero on top (300-004), and the base is never right.

Self-distillation learns from rollouts that are all wrong: every token behind the hint is a lesson.  Rejection
fine-tuning with a verifier learns only from rollouts that happen to be right, a few per cent at first: it is behind at
the beginning, and catches up.  Rollouts are the student's own.  The teacher alone does as well as the mix.

    python examples/03_hard_problems.py
"""

from __future__ import annotations

import dataclasses
import random
import sys
from collections.abc import Sequence

from _lib import subtraction, tables, variants
from _lib.pretraining import write_records
from _lib.variants import console

VARIANTS = (
    variants.SELF_DISTILLATION,
    variants.STRICT,
    variants.TEACHER_ALONE,
    variants.FORWARD_KL,
    variants.REJECTION,
)
NUM_HELD_OUT = 200
NUM_STEPS = 100


def main(argv: Sequence[str] | None = None) -> int:
    options = variants.example_parser(__doc__).parse_args(argv)
    variants.prepare_process()
    folder = options.folder / "hard_problems" / f"seed{options.seed}"
    base = variants.prepared_base(subtraction, options.seed, options.folder)
    problems = write_records(folder / "train.jsonl", [subtraction.record(*pair) for pair in training_pairs()])
    held_out = write_records(folder / "held_out.jsonl", [subtraction.record(*pair) for pair in held_out_pairs()])
    base = dataclasses.replace(base, held_out=held_out)
    steps = options.steps or NUM_STEPS
    settings = (f"num_steps={steps}", "evaluation.num_samples=4")
    runs = [variant.on(problems, *settings) for variant in VARIANTS]
    before, outcomes = tables.compare("Two borrows from a zero", base, runs, folder)
    tables.show_transcripts(before, outcomes[0].measurement)
    moments = sorted({step for step in (25, 50, 75) if step < steps} | {0, steps})
    console.print(tables.accuracy_by_step("Greedy accuracy by step", outcomes, moments))
    console.print(
        f"Before training {before.greedy:.3f} of the greedy responses and {before.sampled:.3f} of the samples are "
        "right.\nA verifier is almost silent at first, so RFT starts behind; the teacher's tokens teach from the "
        "first step on.\nThe teacher alone learns these problems as well as the mix.",
        soft_wrap=True,
    )
    return 0


def training_pairs() -> list[subtraction.Pair]:
    """All of them that may be trained on."""
    return subtraction.hard_problems("train")


def held_out_pairs() -> list[subtraction.Pair]:
    """NUM_HELD_OUT of the test split's."""
    return random.Random(12345).sample(subtraction.hard_problems("test"), NUM_HELD_OUT)


if __name__ == "__main__":
    sys.exit(main())
