# Copyright (c) 2026 the megatron_selfdistill authors. Apache-2.0.
"""Problems that the base never solves: two columns must borrow with a zero on top (300-004).

Without a hint, every text of this base's pretraining gets a borrow from a zero wrong, so neither its greedy responses
nor its samples are right.  A verifier then accepts nothing, and reverse KL, which weighs a token by the student's own
probability, hardly moves what the student never samples.  Forward KL asks for every token that is likely under the
target; guided rollouts show the student where such a token leads.  The reference holds a right token that the base
never proposes back just as it holds back a leak: here the default target needs forward KL and a larger weight w of the
teacher, while a mix with the student, and the teacher alone, need forward KL only.

The base of the quickstart solves these problems now and then: greedily never, but in a few per cent of its samples.
That is enough for reverse KL, and also for rejection fine-tuning with a verifier, which only starts later.

    python examples/03_hard_problems.py
    python examples/03_hard_problems.py --quickstart-base     the base that solves a few per cent
"""

from __future__ import annotations

import dataclasses
import sys
from collections.abc import Sequence

from _lib import subtraction, tables, unsolved_subtraction, variants
from _lib.command_line import console, example_parser, prepare_process
from _lib.measurement import Measurement
from _lib.pretraining import Base, prepared_base, write_records
from _lib.variants import Outcome, Variant

GUIDED = "rollout.guidance=mixed"
NEVER_SOLVED = (
    variants.SELF_DISTILLATION,
    Variant("Self-distillation, guided", (GUIDED,)),
    variants.REJECTION,
    variants.FORWARD_KL,
    variants.SURER_FORWARD_KL,
    Variant("Forward KL, w = 2, guided", (*variants.SURER_FORWARD_KL.overrides, GUIDED)),
    variants.STUDENT_MIX_FORWARD_KL,
    variants.TEACHER_ALONE_FORWARD_KL,
)
SELDOM_SOLVED = (
    variants.SELF_DISTILLATION,
    variants.STUDENT_MIX,
    variants.TEACHER_ALONE,
    variants.FORWARD_KL,
    variants.REJECTION,
)
WITHOUT_GUARDS = ("guards.entropy.max_ratio=null", "guards.max_loss_ratio=null")
NUM_STEPS = 100


def main(argv: Sequence[str] | None = None) -> int:
    """Run the example with the arguments of the command line; return the exit status."""
    parser = example_parser(__doc__)
    parser.add_argument("--quickstart-base", action="store_true", help="start from the base of the quickstart")
    options = parser.parse_args(argv)
    prepare_process()
    task = subtraction.TASK if options.quickstart_base else unsolved_subtraction.TASK
    chosen = SELDOM_SOLVED if options.quickstart_base else NEVER_SOLVED
    directory = options.directory / "hard_problems" / f"{task.name}-seed{options.seed}"
    base = hard(prepared_base(task, options.seed, options.directory))
    problems = write_records(directory / "train.jsonl", subtraction.hard_training_problems())
    steps = options.steps or NUM_STEPS
    settings = (f"num_steps={steps}", "evaluation.num_samples=4", *WITHOUT_GUARDS)
    runs = [variant.on(problems, *settings) for variant in chosen]
    before, outcomes = tables.compare("Two borrows from a zero", base, runs, directory)
    tables.show_transcripts(before, outcomes[0].measurement)
    moments = sorted({step for step in (25, 50, 75) if step < steps} | {0, steps})
    console.print(tables.accuracy_by_step("Greedy accuracy by step", outcomes, moments))
    console.print(judgement(before, outcomes), soft_wrap=True)
    return 0


def hard(base: Base) -> Base:
    """Return the base with the hard held-out problems."""
    records = subtraction.hard_held_out_problems()
    return dataclasses.replace(base, held_out=write_records(base.directory / "hard_held_out.jsonl", records))


def judgement(before: Measurement, outcomes: Sequence[Outcome]) -> str:
    """Return the sentences that interpret the table."""
    solved = [outcome.variant.title for outcome in outcomes if outcome.measurement.greedy >= 0.5]
    silent = [outcome.variant.title for outcome in outcomes if outcome.measurement.greedy < 0.05]
    return (
        f"Before training {before.greedy:.3f} of the greedy responses are right, {before.sampled:.3f} of the samples, "
        f"and {before.hinted:.2f} of the samples with the hint.\n"
        f"At least half of the greedy responses are right after: {'; '.join(solved) or 'none'}.\n"
        f"Fewer than one in twenty is right after: {'; '.join(silent) or 'none'}."
    )


if __name__ == "__main__":
    sys.exit(main())
