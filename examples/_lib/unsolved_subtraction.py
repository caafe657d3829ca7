# Copyright (c) 2026 the megatron_selfdistill authors. Apache-2.0.
"""Subtraction for a base that never solves a hard problem: without a hint, every borrow from a zero goes wrong.

The prompts, responses and hints are those of subtraction.py.  All demonstrations without a hint say 0 - N = N where a
column with a zero on top must borrow, so the base gives the right digit almost no probability.  The problems of this
task are the hard ones: two columns borrow from a zero (300-004).
"""

from __future__ import annotations

import dataclasses
import random

from _lib import subtraction
from _lib.leaking_subtraction import hinted_work, homework
from _lib.subtraction import answer, problem_text, random_pair
from _lib.task import Record


def training_problems(seed: int) -> list[Record]:
    """Return all hard problems of the training split, which are the same for every seed."""
    return subtraction.hard_training_problems()


def corpus_row(rng: random.Random) -> tuple[str, str, str]:
    """Return a row (prompt, input text, target text) of the corpus; 65 % of the rows have no hint."""
    a, b = random_pair(rng, "corpus")
    if rng.random() < 0.65:
        text = homework(a, b, rng, leak=0.0, zero_bug=1.0)
        return problem_text(a, b), text, text
    draft, clean = hinted_work(a, b, rng, leak=0.0)
    return f"{problem_text(a, b)}H{answer(a, b)}|", draft, clean


TASK = dataclasses.replace(
    subtraction.TASK,
    name="unsolved_subtraction",
    corpus_row=corpus_row,
    training_problems=training_problems,
    held_out_problems=subtraction.hard_held_out_problems,
)
