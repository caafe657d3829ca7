# Copyright (c) 2026 the megatron_selfdistill authors. Apache-2.0.
"""The diversity of the sampled responses to a problem, without a model and without torch."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

NUM_GRAM_TOKENS = 4
"""The length in tokens of the sequences that `distinct_grams` counts: the n of n-grams."""


def distinct_right(answers: Iterable[str], correct: Iterable[bool]) -> int:
    """Return the number of different answers among the right samples of a problem.

    ``answers``: the final answer of each sample; answers that differ only in white space are equal.
    ``correct``: the verdict on each sample.
    """
    return len({" ".join(answer.split()) for answer, right in zip(answers, correct, strict=True) if right})


def distinct_grams(responses: Iterable[Sequence[int]]) -> float | None:
    """Return distinct-4: the number of different 4-grams over the number of all 4-grams; None without 4-grams.

    ``responses``: the tokens of the samples of one problem, with their stop tokens.  A 4-gram lies within one response.
    """
    grams: list[tuple[int, ...]] = []
    for tokens in responses:
        grams += zip(*(tokens[start:] for start in range(NUM_GRAM_TOKENS)), strict=False)
    return len(set(grams)) / len(grams) if grams else None


def pass_over_avg(pass_at_k: float, avg_at_k: float) -> float | None:
    """Return pass@k / avg@k over the same problems; None if no sample is right.

    The ratio is 1 if the k samples of a problem are either all right or all wrong.  It is k at most.
    """
    return pass_at_k / avg_at_k if avg_at_k else None
