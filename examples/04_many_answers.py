# Copyright (c) 2026 the megatron_selfdistill authors. Apache-2.0.
"""Many right answers: training shows one answer of 57 = 12 + 45 = 31 + 26 = ..., and the model should keep the others.

The example counts the accuracy and the number of different right answers among 32 samples, on held-out sums.
Self-distillation removes errors and gains variety.  The mix with the student is ahead of the default in both, because
the reference keeps a part of the base's noise; rejection fine-tuning with a verifier gains less variety.  Fine-tuning
on the solutions does as well as self-distillation: a solution here is a response in the student's own format.

The second part starts from a weak base, which was pretrained too briefly to use a hint.  Self-distillation does not
help this base; a verifier does.

    python examples/04_many_answers.py
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

from _lib import additions, tables, variants
from _lib.command_line import console, example_parser, prepare_process
from _lib.curves import ENTROPY, SAMPLED
from _lib.pretraining import prepared_base, write_records
from _lib.variants import Variant

IMITATION = Variant("Fine-tuning on solutions", ("method.name=sft",))
VARIANTS = (variants.SELF_DISTILLATION, variants.STUDENT_MIX, variants.TEACHER_ALONE, IMITATION, variants.REJECTION)
WEAK_VARIANTS = (variants.SELF_DISTILLATION, variants.STUDENT_MIX, variants.TEACHER_ALONE, variants.REJECTION)
NUM_SAMPLES = 32
COLUMNS = ("greedy", "sampled", "different", "pass@8", "hinted", "entropy")


def main(argv: Sequence[str] | None = None) -> int:
    """Run the example with the arguments of the command line; return the exit status."""
    parser = example_parser(__doc__)
    parser.add_argument("--no-weak", action="store_true", help="skip the second part, which starts from a weak base")
    options = parser.parse_args(argv)
    prepare_process()
    directory = options.directory / "many_answers" / f"seed{options.seed}"
    problems = write_records(directory / "train.jsonl", additions.training_problems(options.seed))
    one_base(
        "A base that can use hints", VARIANTS, additions.TASK.pretraining_steps, problems, directory / "strong", options
    )
    if not options.no_weak:
        one_base("A weak base", WEAK_VARIANTS, additions.WEAK_PRETRAINING_STEPS, problems, directory / "weak", options)
        console.print(
            "With a hint the weak base is hardly better than without: there is nothing to distil, whatever the "
            "target, while a verifier still helps.\nLook at `hinted` before training: the method needs a base that can "
            "use a hint.",
            soft_wrap=True,
        )
    return 0


def one_base(
    title: str, chosen: Sequence[Variant], num_steps: int, problems: Path, directory: Path, options: argparse.Namespace
) -> None:
    """Pretrain a base for ``num_steps`` steps or find it, run the chosen variants, and show the results."""
    base = prepared_base(additions.TASK, options.seed, options.directory, num_steps)
    steps = () if options.steps is None else (f"num_steps={options.steps}",)
    settings = ("evaluation.num_samples=16", *steps)
    runs = [variant.on(problems, *settings) for variant in chosen]
    tables.compare(title, base, runs, directory, columns=COLUMNS, panels=(SAMPLED, ENTROPY), num_samples=NUM_SAMPLES)


if __name__ == "__main__":
    sys.exit(main())
