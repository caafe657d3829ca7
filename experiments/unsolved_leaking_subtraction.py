# Copyright (c) 2026 the megatron_selfdistill authors. Apache-2.0.
"""The task of unsolved_subtraction.py with the leaking hint of leaking_subtraction.py: never solved, and leaking."""

from __future__ import annotations

import dataclasses
import random

from _lib import leaking_subtraction, unsolved_subtraction
from _lib.leaking_subtraction import HINT_LEAK, OWN_LEAK, hinted_work, homework
from _lib.subtraction import answer, problem_text, random_pair


def corpus_row(rng: random.Random) -> tuple[str, str, str]:
    """Return a row (prompt, input text, target text) of the corpus; 62 % of the rows have no hint."""
    a, b = random_pair(rng, "corpus")
    if rng.random() < 0.62:
        text = homework(a, b, rng, OWN_LEAK, zero_bug=1.0)
        return problem_text(a, b), text, text
    draft, clean = hinted_work(a, b, rng, HINT_LEAK)
    return f"{problem_text(a, b)}~{answer(a, b)}|", draft, clean


TASK = dataclasses.replace(
    unsolved_subtraction.TASK,
    name="unsolved_leaking_subtraction",
    corpus_row=corpus_row,
    overrides=leaking_subtraction.TASK.overrides,
)
