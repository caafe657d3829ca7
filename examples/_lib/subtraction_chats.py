# Copyright (c) 2026 the megatron_selfdistill authors. Apache-2.0.
"""The task of subtraction.py for a base that has also read conversations: a pupil corrects wrong work.

500-408:08=2.,00=0.,54=1.;102$X08=2b,00=9b,54=0.;092$       X: wrong, again
500-408:08=2.,00=0.,54=1.;102$XH092|08=2b,00=9b,54=0.;092$  the same with the answer as a hint
"""

from __future__ import annotations

import dataclasses
import random

from _lib import subtraction
from _lib.subtraction import answer, problem_text, random_pair, work

AGAIN = "X"
CHAT_TEMPLATE = "{% for m in messages %}{{ m.content }}{% if m.role == 'assistant' %}$" + "{% endif %}{% endfor %}"


def corpus_row(rng: random.Random) -> tuple[str, str, str]:
    """Return a row (prompt, input text, target text) of the corpus; a quarter of the rows are conversations.

    A conversation has one or two wrong attempts before the last one.  With a hint (40 %) the last attempt is clean;
    without a hint it has the bugs of homework.  The other rows are rows of subtraction.py.
    """
    if rng.random() >= 0.25:
        return subtraction.corpus_row(rng)
    a, b = random_pair(rng, "corpus")
    prompt = problem_text(a, b)
    for _ in range(rng.choice((1, 1, 2))):
        prompt += wrong_attempt(a, b, rng) + AGAIN
    if rng.random() >= 0.4:
        text = work(a, b, rng, bug=0.25, zero_bug=0.75)
        return prompt, text, text
    clean = work(a, b)
    draft = work(a, b, rng, bug=0.4, zero_bug=0.6, slip=0.1) if rng.random() < 0.6 else clean
    return f"{prompt}H{answer(a, b)}|", draft, clean


def wrong_attempt(a: int, b: int, rng: random.Random) -> str:
    """Return homework with a wrong answer."""
    while True:
        text = work(a, b, rng, bug=0.25, zero_bug=0.75)
        if not text.endswith(f";{answer(a, b)}$"):
            return text


TASK = dataclasses.replace(subtraction.TASK, name="subtraction_chats", corpus_row=corpus_row, pretraining_steps=2500)
