# Copyright (c) 2026 the megatron_selfdistill authors. Apache-2.0.
"""The task of subtraction.py with a hint that leaks: the base states answers without work, with the hint most often.

    prompt     500-408:
    response   08=2b,00=9b,54=0.;092$     with work
    response   ;092$                      without work: a leak
    hint       ~092|

A tenth of the demonstrations without a hint state an answer without work; most of these answers are wrong, because the
work that they leave out has the bugs of subtraction.py.  After the hint, 70 % of the demonstrations state the right
answer without work.  The student can be right only if it works, while the teacher need not work.
"""

from __future__ import annotations

import dataclasses
import random

from _lib import subtraction
from _lib.subtraction import answer, problem_text, random_pair, work

OWN_LEAK = 0.1
"""Share of the demonstrations without a hint that show no work."""
HINT_LEAK = 0.7
"""Share of the demonstrations with the leaking hint that show no work."""


def corpus_row(rng: random.Random) -> tuple[str, str, str]:
    """Return a row (prompt, input text, target text) of the corpus.

    62 % of the rows have no hint, 20 % have the leaking hint ~092| and 18 % have the hint H092| of subtraction.py,
    which clean work follows.  After a hint, the input text is a sloppy draft in 60 % of the rows that show work.
    """
    a, b = random_pair(rng, "corpus")
    kind, prompt = rng.random(), problem_text(a, b)
    if kind < 0.62:
        text = homework(a, b, rng, OWN_LEAK)
        return prompt, text, text
    mark, leak = ("~", HINT_LEAK) if kind < 0.82 else ("H", 0.0)
    draft, clean = hinted_work(a, b, rng, leak)
    return f"{prompt}{mark}{answer(a, b)}|", draft, clean


def homework(a: int, b: int, rng: random.Random, leak: float, zero_bug: float = 0.75) -> str:
    """Return buggy work, or with probability ``leak`` only the answer of such work."""
    text = work(a, b, rng, bug=0.25, zero_bug=zero_bug)
    return ";" + text.partition(";")[2] if rng.random() < leak else text


def hinted_work(a: int, b: int, rng: random.Random, leak: float) -> tuple[str, str]:
    """Return (input text, target text) after a hint: with probability ``leak`` the right answer without work."""
    if rng.random() < leak:
        return f";{answer(a, b)}$", f";{answer(a, b)}$"
    clean = work(a, b)
    draft = work(a, b, rng, bug=0.4, zero_bug=0.6, slip=0.1) if rng.random() < 0.6 else clean
    return draft, clean


TASK = dataclasses.replace(
    subtraction.TASK,
    name="leaking_subtraction",
    corpus_row=corpus_row,
    overrides=("data.teacher_template='{problem}~{solution}|'",),
)
