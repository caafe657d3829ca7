# Copyright (c) 2026 the megatron_selfdistill authors. Apache-2.0.
"""Guided rollouts: the base never answers correctly, so each token is sampled from the target.

The problems are those of 03_hard_problems.py.  When the student alone samples, every response is wrong at first.  When
each token is sampled from the mix of the same model with and without the hint, most responses are right from the first
step on.  The variants come in pairs that differ only in how responses are sampled; both are evaluated on held-out
problems, without hints and without guidance.  Guided rollouts are off-policy for the student; only the last variant
corrects for that, by truncated importance weights.

    python examples/07_guided_rollouts.py
"""

from __future__ import annotations

import dataclasses
import itertools
import json
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from rich.table import Table

from _lib import llama_subtraction, subtraction, tables, variants
from _lib.command_line import console, example_parser, prepare_process
from _lib.pretraining import prepared_base, write_records
from _lib.variants import Outcome, Variant
from megatron_selfdistill.metrics.run_log import read_samples

GUIDED = "rollout.guidance=mixed"
VARIANTS = (
    variants.SELF_DISTILLATION,
    variants.SURER_FORWARD_KL,
    variants.STUDENT_MIX,
    variants.STUDENT_MIX_STRICT,
    variants.STUDENT_MIX_FORWARD_KL,
)
CORRECTED = Variant(
    "Mix with the student, guided, corrected", ("target.anchor=student", GUIDED, "loss.rollout_correction=truncated")
)
NUM_STEPS = 50


def main(argv: Sequence[str] | None = None) -> int:
    """Run the example with the arguments of the command line; return the exit status."""
    options = example_parser(__doc__).parse_args(argv)
    prepare_process()
    directory = options.directory / "guided_rollouts" / f"seed{options.seed}"
    base = prepared_base(llama_subtraction.TASK, options.seed, options.directory)
    problems = write_records(directory / "train.jsonl", subtraction.hard_training_problems())
    held_out = write_records(directory / "held_out.jsonl", subtraction.hard_held_out_problems())
    base = dataclasses.replace(base, held_out=held_out)
    steps = options.steps or NUM_STEPS
    every_response = ("metrics.show_samples=1000", "metrics.show_samples_every=1", "metrics.console_every=0")
    settings = (f"num_steps={steps}", "evaluation.num_samples=4", *every_response)
    runs = [variant.on(problems) for variant in with_and_without_guidance(settings)]
    _, outcomes = tables.compare("Two borrows from a zero", base, runs, directory)
    moments = sorted({step for step in (25, 50, 75) if step < steps} | {0, steps})
    console.print(tables.accuracy_by_step("Greedy accuracy on held-out problems by step", outcomes, moments))
    console.print(right_rollouts(outcomes))
    return 0


def with_and_without_guidance(settings: Sequence[str]) -> list[Variant]:
    """Return each variant, followed by the same variant with guided rollouts."""
    pairs = [(v, Variant(f"{v.title}, guided", (*v.overrides, GUIDED))) for v in VARIANTS]
    chosen = [*itertools.chain(*pairs), CORRECTED]
    return [Variant(variant.title, (*variant.overrides, *settings)) for variant in chosen]


def right_rollouts(outcomes: Sequence[Outcome]) -> Table:
    """Return a table with the share of right training rollouts at some steps."""
    moments = (0, 1, 5, 10, 20)
    table = tables.new_table("Training rollouts that are right", [f"step {step}" for step in moments])
    answers = {record["id"]: record["answer"] for record in records(outcomes[0].run_dir.parent / "train.jsonl")}
    for outcome in outcomes:
        samples = read_samples(outcome.run_dir)
        shares = []
        for moment in moments:
            verdicts = [is_right(s, answers[s["problem_id"]]) for s in samples if s["step"] == moment + 1]
            shares.append(f"{sum(verdicts) / len(verdicts):.2f}" if verdicts else "")
        table.add_row(tables.label(outcome), *shares)
    return table


def is_right(sample: dict[str, Any], answer: str) -> bool:
    """Return whether a sample of a run ended and states ``answer``."""
    text = "".join(sample["tokens"]["text"][:-1])
    return not sample["truncated"] and text.count(";") == 1 and text.partition(";")[2] == answer


def records(path: Path) -> list[dict[str, Any]]:
    """Return the records of a JSONL file."""
    return [json.loads(line) for line in path.read_text().splitlines()]


if __name__ == "__main__":
    sys.exit(main())
