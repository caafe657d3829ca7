# Copyright (c) 2026 the megatron_selfdistill authors. Apache-2.0.
"""Measure what a target lets through of an invented fact, before any training (docs/real_model.md).

The base reads the sentence of each of the 48 facts after the question, and after question and hint in two wordings.
The table has the probability of the first token of the name, the mean over the facts, and the share of the facts for
which this token is the likeliest one.  Takes two minutes of one core.

    python experiments/fact_targets.py
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path
from statistics import mean
from typing import TYPE_CHECKING, Any

from cell_lines import REPOSITORY
from page_tables import short
from real_map import REPEATED, example

sys.path[:0] = [str(REPOSITORY / "examples")]

from _lib.command_line import prepare_process  # noqa: E402
from _lib.real_tasks import TASKS  # noqa: E402

if TYPE_CHECKING:  # torch is imported by the functions that need it, so that --help answers at once
    from torch import Tensor

FACTS = TASKS["facts"]
WORDINGS = {"that of the task": FACTS.teacher_template, "the base repeats the hint": REPEATED}
WEIGHTS = (0.75, 2, 4)


def main(argv: Sequence[str] | None = None) -> int:
    """Print the table; return the exit status."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "--directory", type=Path, default=Path("runs/real_map"), help="the model, made there if missing"
    )
    options = parser.parse_args(argv)
    prepare_process(num_threads=None)
    from transformers import AutoModelForCausalLM, AutoTokenizer

    hf = options.directory / "hf"
    example.make_hugging_face(hf)
    model, tokenizer = AutoModelForCausalLM.from_pretrained(hf), AutoTokenizer.from_pretrained(hf)
    print(f"| wording | base | teacher | {' | '.join(f'anchored, w = {weight:g}' for weight in WEIGHTS)} |")
    print(f"|{'---|' * (3 + len(WEIGHTS))}")
    of_facts = [first_tokens(model, tokenizer, fact) for fact in facts()]
    for name, of_wording in zip(WORDINGS, zip(*of_facts, strict=True), strict=True):
        shown = [
            f"{short(mean(p for p, _ in cell))}, first of {short(mean(best for _, best in cell))}"
            for cell in zip(*of_wording, strict=True)
        ]
        print(f"| {name} | {' | '.join(shown)} |")
    return 0


def facts() -> list[dict[str, Any]]:
    """Return a training problem for each fact."""
    return list({record["solution"]: record for record in FACTS.problems("train")}.values())


def first_tokens(model: Any, tokenizer: Any, fact: dict[str, Any]) -> list[list[tuple[float, bool]]]:
    """Return (probability, whether it is the likeliest token) of the name's first token, a row for each wording.

    The order of a row is that of the columns: the base, the teacher, and the target of each weight.
    """
    from megatron_selfdistill.loss.definition import mixed_target
    from megatron_selfdistill.loss.target import Target

    before = fact["solution"].removesuffix(f" {fact['answer']}.")
    token = tokenizer.encode(f" {fact['answer']}")[0]
    base = next_logits(model, tokenizer, fact["problem"], before)
    rows = []
    for wording in WORDINGS.values():
        teacher = next_logits(model, tokenizer, wording.format(**fact), before)
        mixed = [mixed_target(base, teacher, Target(teacher_weight=weight), base).log_q.exp() for weight in WEIGHTS]
        columns = (base.softmax(0), teacher.softmax(0), *mixed)
        rows.append([(p[token].item(), p.argmax().item() == token) for p in columns])
    return rows


def next_logits(model: Any, tokenizer: Any, user: str, response: str) -> Tensor:
    """Return the float64 logits [V] of the token after ``response``, an answer to the message ``user``."""
    import torch

    message = [{"role": "user", "content": user}]
    text = tokenizer.apply_chat_template(message, add_generation_prompt=True, tokenize=False) + response
    with torch.no_grad():
        logits: Tensor = model(**tokenizer(text, return_tensors="pt", add_special_tokens=False)).logits[0, -1]
    return logits.double()


if __name__ == "__main__":
    sys.exit(main())
