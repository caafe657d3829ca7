# Copyright (c) 2026 the megatron_selfdistill authors. Apache-2.0.
"""Wrong hints: 30 % or 60 % of the hints that the teacher sees have one wrong digit.

The task, the base and the recipe are those of the quickstart; only the hints of the training problems change.  Under
reverse KL the student learns almost as well even if most hints are wrong: it adopts a wrong digit only where it already
gives that digit a high probability.  The mix with the student and the teacher alone do a few points better there than
the default, because the reference keeps a part of the base's noise.  Forward KL asks for the wrong digits, too.  After
the teacher alone and the mix with the student the samples are then worse than before training, or little better, while
the reference, which hardly considers most wrong digits, holds them back for good.  The entropy guard may stop runs
under forward KL; here it is off, so that every variant runs to its end.

    python examples/02_wrong_hints.py
"""

from __future__ import annotations

import random
import sys
from collections.abc import Sequence

from _lib import subtraction, tables, variants
from _lib.command_line import console, example_parser, prepare_process
from _lib.measurement import measure
from _lib.pretraining import prepared_base, write_records
from _lib.task import Record
from _lib.variants import Outcome

WITHOUT_GUARDS = ("guards.entropy.max_ratio=null", "guards.max_loss_ratio=null")
VARIANTS = (
    variants.SELF_DISTILLATION,
    variants.STUDENT_MIX,
    variants.TEACHER_ALONE,
    variants.FORWARD_KL,
    variants.STUDENT_MIX_FORWARD_KL,
    variants.TEACHER_ALONE_FORWARD_KL,
)


def main(argv: Sequence[str] | None = None) -> int:
    """Run the example with the arguments of the command line; return the exit status."""
    parser = example_parser(__doc__)
    parser.add_argument(
        "--shares", type=float, nargs="+", default=[0.3, 0.6], help="shares of wrong hints (default: .3 .6)"
    )
    options = parser.parse_args(argv)
    prepare_process()
    base = prepared_base(subtraction.TASK, options.seed, options.directory)
    before = measure(base)
    results = {}
    for share in options.shares:
        directory = options.directory / "wrong_hints" / f"seed{options.seed}" / f"{100 * share:.0f}_percent"
        problems = write_records(directory / "train.jsonl", problems_with_wrong_hints(options.seed, share))
        steps = () if options.steps is None else (f"num_steps={options.steps}",)
        runs = [variant.on(problems, *WITHOUT_GUARDS, *steps) for variant in VARIANTS]
        title = f"{100 * share:.0f} % of the hints have one wrong digit"
        _, results[share] = tables.compare(title, base, runs, directory, before=before)
    for share, outcomes in results.items():
        console.print(judgement(share, outcomes), soft_wrap=True)
    return 0


def problems_with_wrong_hints(seed: int, share: float) -> list[Record]:
    """Return the quickstart's training problems; each hint is wrong with probability ``share``."""
    rng = random.Random(f"{seed}/{share}")

    def hint(a: int, b: int) -> str:
        right = subtraction.answer(a, b)
        return subtraction.with_one_wrong_digit(right, rng) if rng.random() < share else right

    return subtraction.training_problems(seed, solution=hint)


def judgement(share: float, outcomes: Sequence[Outcome]) -> str:
    """Return the sentence that compares the targets under both divergences; ``outcomes`` are those of `VARIANTS`."""
    sampled = [f"{outcome.measurement.sampled:.3f}" for outcome in outcomes]
    return (
        f"{100 * share:.0f} % wrong, sampled accuracy of the default, the mix with the student and the teacher alone: "
        f"{', '.join(sampled[:3])} under reverse KL; {', '.join(sampled[3:])} under forward KL."
    )


if __name__ == "__main__":
    sys.exit(main())
