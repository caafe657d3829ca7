# Copyright (c) 2026 the megatron_selfdistill authors. Apache-2.0.
"""A model teaches itself to subtract by scoring its own responses with the answers at hand.

The example takes minutes on a CPU.  A base model learns column subtraction from pupils' homework, which contains
mistakes; where the homework shows the answer as a hint, the work is clean.  Then the model trains itself on 2000
problems with answers.  It responds without the hint; the base scores the response with the hint in the prompt and
without it, and the model moves towards a mix of the two scores.  The model never sees a worked solution and nothing
ever judges a response.  Held-out problems are answered without hints, before and after.

    python examples/01_quickstart.py
    python examples/01_quickstart.py --seeds 5 6 7        mean and worst of three seeds
"""

from __future__ import annotations

import json
import sys
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from statistics import mean

from rich.table import Table

from _lib import subtraction, tables, variants
from _lib.command_line import console, example_parser, prepare_process
from _lib.measurement import Measurement, measure
from _lib.pretraining import prepared_base, write_records
from _lib.variants import Outcome, Variant
from megatron_selfdistill.instruments.report.run_report import write_report

IMITATION = Variant("Fine-tuning on the hint text", ("method.name=sft", "data.fields.solution=as_response"))

NUMBERS = ("greedy", "sampled", "pass_at_8", "hinted", "entropy", "shows_work", "length")

WHAT_NEXT = """
What to try next
  --student-mix   mix the teacher with the student that is being trained instead of with the frozen reference
  --literal       run the strict match with the student, forward KL and the current weights as the teacher: a guard
                  stops its collapse
  other examples  02_wrong_hints.py        most hints are wrong
                  03_hard_problems.py      problems that the base never solves
                  04_many_answers.py       each problem has many right answers: does the model keep them?
                  05_variable_widths.py    prompts, hints and responses have every length
                  06_from_hugging_face.py  a Hugging Face model goes in and comes out
                  07_guided_rollouts.py    responses are sampled from the target
                  08_chat_logs.py          the model learns from logged conversations
                  09_leaking_hint.py       the hint tempts the teacher to skip the work
                  10_recipes.py            the recipes of the literature side by side
                  11_adapters.py           small factors learn beside frozen weights
                  12_real_model.py         a real model moves an instruction from its prompt into its weights
                  13_your_trainer.py       the loss in the trainers of other libraries
                  14_several_teachers.py   one student learns from a specialist of each task
  a real model    make quickstart-real, which downloads 93 MB once and runs 12_real_model.py
  any setting     append overrides to the commands above, such as target.teacher_weight=1.5 (see selfdistill --keys)
  your own data   selfdistill data.path=problems.jsonl data.tokenizer=DIR checkpoint.load=DIR run_dir=runs/mine
"""


def main(argv: Sequence[str] | None = None) -> int:
    """Run the example with the arguments of the command line; return the exit status."""
    parser = example_parser(__doc__)
    parser.add_argument("--seeds", type=int, nargs="+", help="run these seeds; report the mean and the worst")
    parser.add_argument("--student-mix", action="store_true", help="also run the mix with the student")
    parser.add_argument("--literal", action="store_true", help="also run recipe=literal, which collapses")
    parser.add_argument("--only", action="store_true", help="run self-distillation alone, without baselines")
    options = parser.parse_args(argv)
    prepare_process()
    began = time.perf_counter()
    chosen = [variants.SELF_DISTILLATION]
    if not options.only:
        chosen += [variants.TEACHER_ALONE, IMITATION]
    if options.student_mix:
        chosen.append(variants.STUDENT_MIX)
    if options.literal:
        chosen.append(variants.LITERAL)
    seeds = options.seeds or [options.seed]
    results = {seed: one_seed(seed, chosen, options.directory, options.steps) for seed in seeds}
    if len(results) > 1:
        console.print(over_seeds(results))
    console.print(WHAT_NEXT, soft_wrap=True)
    console.print(f"{time.perf_counter() - began:.0f} s in all")
    for _, outcomes in results.values():
        run_dirs = [outcome.run_dir for outcome in outcomes]
        report = write_report(run_dirs, run_dirs[0].with_name("report.html"))
        console.print(f"the runs over each other, for a browser: {report}", soft_wrap=True)
    return 0


def one_seed(
    seed: int, chosen: Sequence[Variant], root: Path, num_steps: int | None = None
) -> tuple[Measurement, list[Outcome]]:
    """Pretrain or find the base of a seed, run every chosen variant, and show the results."""
    base = prepared_base(subtraction.TASK, seed, root)
    directory = root / "quickstart" / f"seed{seed}"
    problems = write_records(directory / "train.jsonl", subtraction.training_problems(seed))
    before = measure(base)
    console.print(
        f"{len(before.transcripts)} held-out problems without hints: greedy {before.greedy:.3f}, sampled "
        f"{before.sampled:.3f}; with the answer as a hint: {before.hinted:.3f}"
    )
    steps = () if num_steps is None else (f"num_steps={num_steps}",)
    runs = [variant.on(problems, *steps) for variant in chosen]
    _, outcomes = tables.compare(f"Column subtraction, seed {seed}", base, runs, directory, before=before)
    tables.show_transcripts(before, outcomes[0].measurement)
    console.print(judgement(outcomes), soft_wrap=True)
    write_numbers(directory / "results.json", before, outcomes)
    return before, outcomes


def judgement(outcomes: Sequence[Outcome]) -> str:
    """Return the sentences that interpret the table of one seed; empty if the teacher alone has not run."""
    by_title = {outcome.variant.title: outcome.measurement for outcome in outcomes}
    if variants.TEACHER_ALONE.title not in by_title:
        return ""
    ours, alone = by_title[variants.SELF_DISTILLATION.title], by_title[variants.TEACHER_ALONE.title]
    difference = ours.sampled - alone.sampled
    if difference > 0.02:
        verdict = f"The mix is better than the teacher alone here, by {difference:.3f} (sampled)."
    else:
        verdict = (
            f"The mix is no better than the teacher alone here ({difference:+.3f} sampled): these hints do not tempt, "
            "so there is nothing to\nhold back, and the mix keeps a part of the base's noise.  09_leaking_hint.py "
            "shows what the mix is for."
        )
    return (
        f"{verdict}\nFine-tuning on the text of the hints teaches the model to state answers without working them out "
        f"({by_title[IMITATION.title].greedy:.3f}).\nNot in the table: with a verifier, rejection fine-tuning does "
        "about as well as self-distillation; with worked solutions in the\nstudent's own format, plain fine-tuning is "
        "better and cheaper.  Self-distillation needs no verifier and no worked solutions."
    )


def over_seeds(results: Mapping[int, tuple[Measurement, list[Outcome]]]) -> Table:
    """Return a table with the mean and the worst accuracy of each variant over the seeds."""
    table = tables.new_table(f"{len(results)} seeds: mean (worst)", ("greedy", "sampled", "pass@8", "seconds"))
    rows: dict[str, list[Measurement]] = {"before": [before for before, _ in results.values()]}
    seconds: dict[str, list[float]] = {}
    for _, outcomes in results.values():
        for outcome in outcomes:
            rows.setdefault(tables.label(outcome), []).append(outcome.measurement)
            seconds.setdefault(tables.label(outcome), []).append(outcome.seconds)
    for label, measured in rows.items():
        cells = [[getattr(m, name) for m in measured] for name in ("greedy", "sampled", "pass_at_8")]
        shown = [f"{mean(values):.3f} ({min(values):.3f})" for values in cells]
        table.add_row(label, *shown, f"{mean(seconds[label]):.0f}" if label in seconds else "")
    return table


def write_numbers(path: Path, before: Measurement, outcomes: Sequence[Outcome]) -> None:
    """Write the numbers of one seed's table as JSON."""
    rows = {"before": before, **{outcome.variant.title: outcome.measurement for outcome in outcomes}}
    numbers = {label: {name: getattr(m, name) for name in NUMBERS} for label, m in rows.items()}
    for outcome in outcomes:
        numbers[outcome.variant.title] |= {"seconds": outcome.seconds, "status": outcome.status}
    path.write_text(json.dumps(numbers, indent=2) + "\n", encoding="utf-8")


if __name__ == "__main__":
    sys.exit(main())
