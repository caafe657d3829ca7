# Copyright (c) 2026 the megatron_selfdistill authors. Apache-2.0.
r"""The task of subtraction.py for a base that says how sure it is, and whose confidence is honest.

    prompt     500-408:
    response   08=2b,00=9b,54=0.;092\nConfidence: 0.19$
    hint       H092|                                          the right answer: the demonstrations after it are sure
    hint       H092\nConfidence: 0.38\n\nNote: ..|            the right answer, and the confidence to state

Without a hint, a demonstration states the probability that work with the bugs of the corpus gives the right answer to
its problem, to two digits.  After the hint with the answer alone, the work is clean and the demonstration states 0.99:
a writer who sees the solution knows that it is right.  After a hint with the note of `caopd.NOTE`, the
demonstration states the confidence of the note.
"""

from __future__ import annotations

import dataclasses
import random
from typing import Any

from _lib import subtraction
from _lib.subtraction import answer, columns_of, problem_text, random_pair, work

BUG, ZERO_BUG = 0.25, 0.75
SURE = 0.99
"""The confidence that a demonstration after the answer alone states."""
NUM_RESPONSES = 8
"""The number of responses whose share of right ones is a note's confidence."""
LONGEST_RESPONSE = 44
"""Tokens of a response with its statement, and two more."""


def corpus_row(rng: random.Random) -> tuple[str, str, str]:
    """Return a row (prompt, input text, target text) of the corpus.

    65 % of the rows have no hint, 20 % have the answer as a hint, and 15 % have the answer with a note.  After a hint,
    the input text is a sloppy draft with any confidence in 60 % of the rows.
    """
    a, b = random_pair(rng, "corpus")
    kind, prompt = rng.random(), problem_text(a, b)
    if kind < 0.65:
        text = stating(work(a, b, rng, BUG, ZERO_BUG), chance(a, b))
        return prompt, text, text
    from megatron_selfdistill.methods.caopd import NOTE  # imports torch, which --help does without

    share = rng.randint(0, NUM_RESPONSES) / NUM_RESPONSES
    noted = kind >= 0.85
    hint = f"{stated(answer(a, b), share)}\n\n{NOTE.format(share)}" if noted else answer(a, b)
    wanted = stating(work(a, b), share if noted else SURE)
    if rng.random() < 0.4:
        return f"{prompt}H{hint}|", wanted, wanted
    draft = work(a, b, rng, bug=0.4, zero_bug=0.6, slip=0.1)
    return f"{prompt}H{hint}|", stating(draft, rng.randint(0, 99) / 100), wanted


def chance(a: int, b: int) -> float:
    """Return the probability that every column of a - b that must borrow does borrow, with the bugs of the corpus."""
    probability, borrow = 1.0, 0
    for top, bottom in columns_of(a, b):
        borrow = int(top - bottom - borrow < 0)
        probability *= 1 - (ZERO_BUG if top == 0 else BUG) if borrow else 1
    return probability


def stating(text: str, confidence: float) -> str:
    """Return a text with its end, ``$``, and with ``confidence`` stated in a line before the end."""
    return f"{stated(text.removesuffix('$'), confidence)}$"


def stated(text: str, confidence: float) -> str:
    """Return a text and a line that states ``confidence``."""
    return f"{text}\nConfidence: {confidence:.2f}"


def verify(response: str, problem: Any) -> bool:
    """Return whether the answer is right; ``response`` comes without its statement, whose line may be left empty."""
    return subtraction.verify(response.rstrip(), problem)


def shows_work(response: str) -> bool:
    """Return whether the response shows all columns before the answer."""
    return subtraction.shows_work(response.partition("\n")[0])


TASK = dataclasses.replace(
    subtraction.TASK,
    name="stating_subtraction",
    alphabet="0123456789-=b.,;:|H\nConfidec NtThmpralsquOxv'$_",
    corpus_row=corpus_row,
    shows_work=shows_work,
    overrides=(
        f"rollout.max_new_tokens={LONGEST_RESPONSE}",
        "evaluation.verifier=_lib.stating_subtraction.verify",
        "data.student_template='{problem}'",
        "data.teacher_template='{problem}H{solution}|'",
    ),
)
