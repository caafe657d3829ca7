# Copyright (c) 2026 the megatron_selfdistill authors. Apache-2.0.
"""Supervised fine-tuning: next-token training on the text of the solutions; nothing is sampled.

Algorithm: The text of the solution is the response, after the student's prompt. There is no teacher. The method is the
baseline that learns from the same data without a rollout, and the student of method.name=rlt learns by it.

Equation:

    w = 0,   a = 1 for every token of the solution

Paper: None.

Differences: None. No recipe is needed; data.solutions=given is required.

Command:

    selfdistill method.name=sft checkpoint.load=... data.tokenizer=... data.path=problems.jsonl run_dir=runs/sft

Expected: On additions, whose solutions are one right answer, 100 steps of 32 texts raise the sampled accuracy from .51
to .92. On subtraction, whose solutions are answers without work, it falls from .36 to .006 at the best of three
learning rates. With worked solutions it rises to .97 (docs/recipes/comparison.md).

Known failure: The student learns the form of the solutions: short solutions without work end the work.
"""

from __future__ import annotations

from dataclasses import dataclass

from megatron_selfdistill.config.schema.method_config import MethodSettings, Needs
from megatron_selfdistill.methods.default import SelfDistillation


@dataclass(frozen=True)
class SftSettings(MethodSettings):
    """The settings of supervised fine-tuning."""

    needs = Needs(teacher_prompt=None, samples=None)
    required = ("data.kind=problems", "data.solutions=given")


class Sft(SelfDistillation):
    """Supervised fine-tuning: the source takes the solutions as responses."""

    Settings = SftSettings
