# Copyright (c) 2026 the megatron_selfdistill authors. Apache-2.0.
"""The task of unsolved_subtraction.py with the leaking hint of leaking_subtraction.py: never solved, and leaking."""

from __future__ import annotations

import random

from _lib.leaking_subtraction import HINT_LEAK, OVERRIDES, OWN_LEAK, hinted_work, homework
from _lib.subtraction import (
    ALPHABET,
    PRETRAINING,
    PRETRAINING_STEPS,
    answer,
    problem_text,
    random_pair,
    shows_work,
    verify,
)
from _lib.unsolved_subtraction import held_out_problems, training_problems

__all__ = [
    "ALPHABET",
    "NAME",
    "OVERRIDES",
    "PRETRAINING",
    "PRETRAINING_STEPS",
    "corpus_row",
    "held_out_problems",
    "shows_work",
    "training_problems",
    "verify",
]

NAME = "unsolved_leaking_subtraction"


def corpus_row(rng: random.Random) -> tuple[str, str, str]:
    """Return a row (prompt, input text, target text) of the corpus; 62 % of the rows have no hint."""
    a, b = random_pair(rng, "corpus")
    if rng.random() < 0.62:
        text = homework(a, b, rng, OWN_LEAK, zero_bug=1.0)
        return problem_text(a, b), text, text
    draft, clean = hinted_work(a, b, rng, HINT_LEAK)
    return f"{problem_text(a, b)}~{answer(a, b)}|", draft, clean
