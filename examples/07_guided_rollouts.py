# Copyright (c) 2026 the megatron_selfdistill authors. Apache-2.0.
"""Guided rollouts: the base is never right, so each token is drawn from the target itself, out of both contexts.

The problems are those of 03_hard_problems.py.  Written by the student alone, every rollout is wrong at first; drawn
from the mix of what the same weights say with and without the hint, most are right from the first step on.  Each pair
of variants differs in the rollouts only; both are judged on held-out problems, without hints and without guidance.
Guided rollouts are off-policy for the student; only the last variant corrects for that, by truncated importance
weights.

    python examples/07_guided_rollouts.py
    python examples/07_guided_rollouts.py --engine vllm        both kinds of rollouts from vLLM (where it is installed)
"""

from __future__ import annotations

import dataclasses
import importlib
import itertools
import json
import sys
from collections.abc import Sequence
from pathlib import Path

from rich.table import Table

from _lib import llama_subtraction, subtraction, tables, variants
from _lib.pretraining import Base, write_records
from _lib.variants import Outcome, Variant, console

hard = importlib.import_module("03_hard_problems")

GUIDED = "rollout.guidance=mixed"
VARIANTS = (variants.SELF_DISTILLATION, variants.STRICT, variants.FORWARD_KL)
CORRECTED = Variant("Self-distillation, guided, corrected", (GUIDED, "loss.rollout_correction=truncated"))
ENGINES = {
    "megatron": (),
    "vllm": ("rollout.engine=vllm", "rollout.kv_cache_gb=0.25"),
}
NUM_STEPS = 50


def main(argv: Sequence[str] | None = None) -> int:
    parser = variants.example_parser(__doc__)
    parser.add_argument(
        "--engine", choices=sorted(ENGINES), default="megatron", help="what samples (default: megatron)"
    )
    options = parser.parse_args(argv)
    variants.prepare_process()
    folder = options.folder / "guided_rollouts" / options.engine / f"seed{options.seed}"
    base = variants.prepared_base(llama_subtraction, options.seed, options.folder)
    problems = write_records(folder / "train.jsonl", [subtraction.record(*pair) for pair in hard.training_pairs()])
    held_out = write_records(folder / "held_out.jsonl", [subtraction.record(*pair) for pair in hard.held_out_pairs()])
    base = dataclasses.replace(base, held_out=held_out)
    steps = options.steps or NUM_STEPS
    settings = (f"num_steps={steps}", "evaluation.num_samples=4", *ENGINES[options.engine])
    runs = [variant.on(problems) for variant in with_and_without_guidance(settings, folder)]
    _, outcomes = tables.compare(f"Two borrows from a zero, rollouts by {options.engine}", base, runs, folder)
    moments = sorted({step for step in (25, 50, 75) if step < steps} | {0, steps})
    console.print(tables.accuracy_by_step("Greedy accuracy on held-out problems by step", outcomes, moments))
    console.print(right_rollouts(outcomes, base))
    return 0


def with_and_without_guidance(settings: Sequence[str], folder: Path) -> list[Variant]:
    """Each variant, then the same with guided rollouts; every one writes its rollouts down."""
    pairs = [(variant, Variant(f"{variant.title}, guided", (*variant.overrides, GUIDED))) for variant in VARIANTS]
    found = []
    for variant in [*itertools.chain(*pairs), CORRECTED]:
        recorded = recording(folder, variant)
        recorded.unlink(missing_ok=True)
        found.append(Variant(variant.title, (*variant.overrides, *settings, f"rollout.record={recorded}")))
    return found


def recording(folder: Path, variant: Variant) -> Path:
    """Where the variant's rollouts are written down."""
    return folder / f"{variant.title.lower().replace(', ', '-').replace(' ', '-')}.jsonl"


def right_rollouts(outcomes: Sequence[Outcome], base: Base) -> Table:
    """Share of the training rollouts of a step that are right."""
    moments = (0, 1, 5, 10, 20)
    table = tables.new_table("Training rollouts that are right", [f"step {step}" for step in moments])
    answers = {record["id"]: record["answer"] for record in records(outcomes[0].run_dir.parent / "train.jsonl")}
    for outcome in outcomes:
        written = records(recording(outcome.run_dir.parent, outcome.variant))
        shares = []
        for moment in moments:
            verdicts = [is_right(r, answers[r["problem_id"]], base) for r in written if r["step"] == moment]
            shares.append(f"{sum(verdicts) / len(verdicts):.2f}" if verdicts else "")
        table.add_row(tables.label(outcome), *shares)
    return table


def is_right(record: dict, answer: str, base: Base) -> bool:
    text = "".join(base.task.ALPHABET[token] for token in record["token_ids"][:-1])
    return record["finish_reason"] == "stop" and text.count(";") == 1 and text.partition(";")[2] == answer


def records(path: Path) -> list[dict]:
    return [json.loads(line) for line in path.read_text().splitlines()]


if __name__ == "__main__":
    sys.exit(main())
