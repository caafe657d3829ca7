# Copyright (c) 2026 the megatron_selfdistill authors. Apache-2.0.
"""A model teaches itself to subtract: it reads its own responses next to the answers.  Minutes on a CPU.

A base model has learnt column subtraction from pupils' homework, mistakes included, and to work cleanly where the answer
is given as a hint.  Then it trains itself on 2000 problems of which it knows the answers alone: it responds without the
hint, reads its response behind the hint, and moves towards a mix of the two.  No worked solution is ever seen and no
response is ever judged.  Held-out problems are answered without hints, before and after.

    python examples/01_quickstart.py
    python examples/01_quickstart.py --seeds 5 6 7        mean and worst of three
"""

from __future__ import annotations

import dataclasses
import json
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from statistics import mean

import arms
import subtraction
from arms import Arm, Measurement, Outcome, console
from pretraining import write_records
from rich.table import Table

from megatron_selfdistill.report.curves import plot_curves

SELF_DISTILLATION = Arm("Self-distillation", arms.SELF_DISTILLATION)
TEACHER_ALONE = Arm("Teacher alone", arms.TEACHER_ALONE)
IMITATION = Arm("Fine-tuning on the hint text", ("objective=solutions", "data.fields.solution=as_response"))
LITERAL = Arm("Literal recipe", ("recipe=literal",))

NUMBERS = ("greedy", "sampled", "pass_at_8", "hinted", "entropy", "shows_work", "length")

WHAT_NEXT = """\
What to try next
  other recipes   --literal adds the strict match with forward KL and a live teacher: it collapses, a guard stops it
  other examples  02_wrong_hints.py       most hints are wrong
                  03_hard_problems.py     the base is never right
                  04_many_answers.py      many right answers: are they kept?
                  05_variable_widths.py   prompts, hints and responses of every length
  any setting     the commands above take further overrides: target.teacher_weight=1.5 loss.divergence=jsd ...
                  (selfdistill --keys lists them all)
  your own        selfdistill data.path=problems.jsonl data.tokenizer=DIR checkpoint.load=DIR run_dir=runs/mine
"""


def main(argv: Sequence[str] | None = None) -> int:
    parser = arms.example_parser(__doc__, "quickstart")
    parser.add_argument("--seeds", type=int, nargs="+", help="run each of these; report the mean and the worst")
    parser.add_argument("--literal", action="store_true", help="also run recipe=literal, which collapses")
    parser.add_argument("--only", action="store_true", help="self-distillation alone, without the arms to compare with")
    options = parser.parse_args(argv)
    arms.prepare_process()
    folder = options.folder / options.name
    compared = () if options.only else (TEACHER_ALONE, IMITATION)
    chosen = (SELF_DISTILLATION, *compared, *((LITERAL,) if options.literal else ()))
    began = time.perf_counter()
    results = {seed: one_seed(seed, chosen, options.folder) for seed in options.seeds or [options.seed]}
    if len(results) > 1:
        console.print(over_seeds(results))
    for seed, (before, outcomes) in results.items():
        write_numbers(folder / f"seed{seed}" / "results.json", before, outcomes)
    console.print(WHAT_NEXT, highlight=False)
    console.print(f"{time.perf_counter() - began:.0f} s in all", highlight=False)
    return 0


def one_seed(seed: int, chosen: Sequence[Arm], root: Path) -> tuple[Measurement, list[Outcome]]:
    """Pretrain or find the base, run every arm, show what came out."""
    base = arms.prepared_base(subtraction, seed, root)
    folder = root / "quickstart" / f"seed{seed}"
    problems = write_records(folder / "train.jsonl", subtraction.training_problems(seed))
    before = arms.measure(base)
    console.print(
        f"{len(before.transcripts)} held-out problems without hints: greedy {before.greedy:.3f}, sampled "
        f"{before.sampled:.3f}; with the answer as a hint: {before.hinted:.3f}",
        highlight=False,
    )
    with_data = [dataclasses.replace(arm, overrides=(f"data.path={problems}", *arm.overrides)) for arm in chosen]
    outcomes = [arms.run_arm(arm, base, folder) for arm in with_data]
    console.rule(f"[bold]seed {seed}", align="left")
    arms.show_transcripts(before, outcomes[0].measurement)
    console.print(arms.comparison("Column subtraction", arms.rows_of(before, outcomes)))
    console.print(judgement(outcomes), highlight=False)
    picture = plot_curves({o.arm.title: o.run_dir for o in outcomes}, folder / "curves.png")
    console.print(f"curves: {picture}\n", highlight=False)
    return before, outcomes


def judgement(outcomes: Sequence[Outcome]) -> str:
    """What the table says, and what it does not."""
    by_title = {outcome.arm.title: outcome.measurement for outcome in outcomes}
    ours, alone = by_title[SELF_DISTILLATION.title], by_title.get(TEACHER_ALONE.title)
    if alone is None:
        return ""
    difference = ours.sampled - alone.sampled
    verdict = (
        f"The mix is better than the teacher alone here, by {difference:.3f} (sampled)."
        if difference > 0.02
        else f"The mix is no better than the teacher alone here ({difference:+.3f} sampled): with reverse KL and a good "
        "teacher, plain on-policy self-distillation does as well.  The mix pays with forward KL and poor teachers "
        "(02_wrong_hints.py, 04_many_answers.py)."
    )
    return (
        f"{verdict}\nFine-tuning on the text of the hints teaches to state an answer without working it out "
        f"({by_title[IMITATION.title].greedy:.3f}).  With a verifier, rejection fine-tuning would do about as well as "
        "self-distillation, and with worked solutions in the student's own format plain fine-tuning would do better; "
        "self-distillation needs neither."
    )


def over_seeds(results: dict[int, tuple[Measurement, list[Outcome]]]) -> Table:
    """Mean and worst of each arm."""
    table = Table(title=f"{len(results)} seeds: mean (worst)", title_justify="left", title_style="bold")
    table.add_column("")
    for name in ("greedy", "sampled", "pass@8", "seconds"):
        table.add_column(name, justify="right")
    rows: dict[str, list[Measurement]] = {"before": [before for before, _ in results.values()]}
    seconds: dict[str, float] = {}
    for _, outcomes in results.values():
        for outcome in outcomes:
            rows.setdefault(outcome.arm.title, []).append(outcome.measurement)
            seconds[outcome.arm.title] = seconds.get(outcome.arm.title, 0.0) + outcome.seconds / len(results)
    for label, measured in rows.items():
        cells = [[getattr(m, name) for m in measured] for name in ("greedy", "sampled", "pass_at_8")]
        shown = [f"{mean(values):.3f} ({min(values):.3f})" for values in cells]
        table.add_row(label, *shown, f"{seconds[label]:.0f}" if label in seconds else "")
    return table


def write_numbers(path: Path, before: Measurement, outcomes: Sequence[Outcome]) -> None:
    """The table as JSON."""
    rows = {"before": before, **{outcome.arm.title: outcome.measurement for outcome in outcomes}}
    numbers = {label: {name: getattr(m, name) for name in NUMBERS} for label, m in rows.items()}
    for outcome in outcomes:
        numbers[outcome.arm.title] |= {"seconds": outcome.seconds, "status": outcome.status}
    path.write_text(json.dumps(numbers, indent=2) + "\n", encoding="utf-8")


if __name__ == "__main__":
    sys.exit(main())
