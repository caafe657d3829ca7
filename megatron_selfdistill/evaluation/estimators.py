# Copyright (c) 2026 the megatron_selfdistill authors. Apache-2.0.
"""Numbers from the samples of problems: pass@k, majority@k, diversity, calibration and bootstrap intervals."""

from __future__ import annotations

import math
import re
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from functools import lru_cache

import numpy as np
from numpy.typing import NDArray

NUM_GRAM_TOKENS = 4
"""The length in tokens of the sequences that `distinct_grams` counts: the n of n-grams."""

NUM_RESAMPLES = 10_000
# Elements of one temporary: resamples are processed in groups of this size.
_MAX_ELEMENTS = 2**22
_ROUNDING = 1e-12


def pass_at_k(num_samples: int, num_correct: int, k: int) -> float:
    """Return the unbiased estimate of the chance that one of k samples is correct, ``1 - C(n - c, k) / C(n, k)``.

    n is ``num_samples`` and c is ``num_correct``.
    Source: Chen et al. 2021 (arXiv 2107.03374), equation 1.
    """
    return 1 - math.comb(num_samples - num_correct, k) / math.comb(num_samples, k)


def majority_at_k(answers: Sequence[str | None], correct: Sequence[bool], k: int) -> float:
    """Return the unbiased estimate of the chance that the most frequent answer among k samples is correct.

    The estimate is the mean over all subsets of k of the n samples.  The value of a subset is the share of correct
    samples among the samples that gave the subset's most frequent answer.  If several answers are the most frequent,
    the value is the mean over these answers; if no sample of the subset has an answer, the value is 0.

    ``answers``: the answer of each sample; a sample with None does not vote.  ``correct``: the verdict on each sample;
    a verifier may judge two responses with the same answer differently.

    The estimate equals the sum, over answers a and numbers of votes t, of (share of a's samples that are correct) times
    E[1 / (1 + ties); a has t votes and no answer has more].  In a random subset of k of n samples, the votes of the
    answers are independent binomials with p = k / n under the condition that they sum to k.  The expectation is
    therefore a product of polynomials, one for each answer that can reach t votes.
    """
    n = len(answers)
    votes = Counter(answer for answer in answers if answer is not None)
    num_correct = Counter(answer for answer, is_correct in zip(answers, correct, strict=True) if is_correct)
    p, num_silent = k / n, n - votes.total()
    total = 0.0
    for answer, count in votes.items():
        others = [number for other, number in votes.items() if other != answer]
        for t in range(1, min(count, k) + 1) if num_correct[answer] else ():
            total += num_correct[answer] / count * _binomial(count, p)[t] * _wins(others, num_silent, t, k - t, p)
    return float(total / _binomial(n, p)[k])


def _wins(others: Sequence[int], num_silent: int, t: int, rest: int, p: float) -> float:
    """Return E[1 / (1 + ties); no other answer has more than ``t`` votes], for ``rest`` samples without the answer."""
    # The answers that cannot reach t votes need no distinction: together these answers are one binomial.
    below = _binomial(num_silent + sum(count for count in others if count < t), p)[: rest + 1]
    table = np.zeros((rest + 1, 1))  # [samples so far, ties so far]
    table[: len(below), 0] = below
    for count in (count for count in others if count >= t):
        chances = _binomial(count, p)
        wider = np.zeros((rest + 1, table.shape[1] + 1))
        for x in range(min(t, rest + 1)):
            wider[x:, :-1] += chances[x] * table[: rest + 1 - x]
        if t <= rest:
            wider[t:, 1:] += chances[t] * table[: rest + 1 - t]
        table = wider
    return float((table[rest] / np.arange(1, table.shape[1] + 1)).sum())


@lru_cache(maxsize=4096)
def _binomial(count: int, p: float) -> NDArray[np.float64]:
    """Return the probabilities [count + 1] of 0 .. count successes, by convolution, since factorials overflow."""
    chances = np.ones(1)
    for _ in range(count):
        chances = np.convolve(chances, [1 - p, p])
    return chances


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


@dataclass(frozen=True)
class Interval:
    """A mean over problems, and the interval of 95 % of the means of resampled problems."""

    mean: float
    low: float
    """The 2.5 % quantile."""
    high: float
    """The 97.5 % quantile."""
    probability_not_above_0: float
    """The share of the resampled means that are not above 0; for B - A, the share in which B is not above A."""


def bootstrap(values: np.ndarray, num_resamples: int = NUM_RESAMPLES, seed: int = 0) -> list[Interval]:
    """Return the interval of the mean of each column, from resampled problems that all columns share.

    ``values``: float ``[num_problems, num_columns]``.  If the values are differences of two models on the same
    problems, the result is the paired bootstrap.  The function resamples problems only; the scatter of the values
    contains the sampling of their responses.  The cost is num_resamples x num_problems random numbers.
    """
    means = resampled_means(values, num_resamples, seed)
    lows, highs = np.quantile(means, [0.025, 0.975], axis=0)
    # A sum of equal and opposite floats may miss 0 by its rounding.
    not_above = (means <= _ROUNDING).mean(axis=0)
    return [Interval(*map(float, column)) for column in zip(values.mean(axis=0), lows, highs, not_above, strict=True)]


def resampled_means(values: np.ndarray, num_resamples: int, seed: int) -> np.ndarray:
    """Return ``[num_resamples, num_columns]``, each row the mean of num_problems rows sampled from ``values``.

    The rows of ``values`` are sampled with replacement.
    """
    num_problems = len(values)
    rng = np.random.default_rng(seed)
    rows = max(1, _MAX_ELEMENTS // num_problems)
    means = []
    for start in range(0, num_resamples, rows):
        count = min(rows, num_resamples - start)
        sampled = rng.integers(num_problems, size=(count, num_problems))
        sampled += num_problems * np.arange(count)[:, None]  # every row has bins of its own
        times = np.bincount(sampled.ravel(), minlength=count * num_problems).reshape(count, num_problems)
        means.append(times.astype(np.float64) @ values / num_problems)
    return np.concatenate(means)


NUM_BINS = 10
"""The number of equal bins of `expected_calibration_error`."""


@dataclass(frozen=True)
class Confidence:
    """The confidence of a model in one response."""

    value: float
    """The probability in [0, 1] that the response is right; NaN where the sampler does not know its log-probs."""
    log: float
    """The natural logarithm of ``value``.  The logarithm also orders long responses, whose ``value`` is 0 in float64.
    """
    is_stated: bool
    """Whether the text of the response states the confidence."""

    @classmethod
    def stated(cls, value: float) -> Confidence:
        """Return the confidence that a text states, in [0, 1]."""
        return cls(value, math.log(value) if value else -math.inf, True)

    @classmethod
    def of_log_probs(cls, log_probs: Sequence[float]) -> Confidence:
        """Return the probability of a response, ``exp(sum of log_probs)``; NaN if one of them is NaN.

        ``log_probs``: the log-probs of the response's tokens in nats, with the stop token (`Response.log_probs`).
        """
        log = math.nan if any(map(math.isnan, log_probs)) else min(0.0, math.fsum(log_probs))
        return cls(math.exp(log), log, False)


@dataclass(frozen=True)
class Calibration:
    """The calibration of several responses, each with a confidence and a verdict (docs/evaluation.md)."""

    ece: float
    brier: float
    spr: float | None
    """The separation of right and wrong responses (`separation`); None unless some are right and some are wrong."""
    ocg: float
    stated_confidence: float


def split_confidence(text: str, pattern: re.Pattern[str] | None) -> tuple[float | None, str]:
    """Return the confidence that ``text`` states, and the text without its statements of confidence.

    ``pattern``: finds a statement, and its first group is the number; None finds nothing.  A match whose group is not a
    number in [0, 1] is no statement.  The last statement counts.  Without a statement, the result is None and ``text``.
    """
    if pattern is None:
        return None, text
    value, kept, end = None, [], 0
    for match in pattern.finditer(text):
        number = _number(match[1])
        if number is not None:
            value = number
            kept.append(text[end : match.start()])
            end = match.end()
    return value, "".join([*kept, text[end:]])


def calibration(confidences: Sequence[Confidence], correct: Sequence[bool]) -> Calibration | None:
    """Return the calibration of responses; None without responses, and where a confidence is unknown.

    ``confidences``, ``correct``: the confidence in each response, and the verdict on it.
    """
    values, right = np.array([it.value for it in confidences]), np.array(correct, dtype=bool)
    if not len(values) or np.isnan(values).any():
        return None
    return Calibration(
        ece=expected_calibration_error(values, right),
        brier=float(np.square(values - right).mean()),
        spr=separation(np.array([it.log for it in confidences]), right),
        ocg=float(values.mean() - right.mean()),
        stated_confidence=float(np.mean([it.is_stated for it in confidences])),
    )


def expected_calibration_error(values: NDArray[np.float64], correct: NDArray[np.bool_]) -> float:
    """Return the mean, over responses, of the gap between mean confidence and accuracy in the bin of each response.

    Bin i of `NUM_BINS` has the ``values`` in [i / NUM_BINS, (i + 1) / NUM_BINS); the last bin also has 1.
    ``values``, ``correct``: ``[n]`` each, at least one.
    """
    bins = np.minimum((values * NUM_BINS).astype(np.int64), NUM_BINS - 1)
    gaps = np.bincount(bins, weights=values - correct, minlength=NUM_BINS)
    return float(np.abs(gaps).sum() / len(values))


def separation(scores: NDArray[np.float64], correct: NDArray[np.bool_]) -> float | None:
    """Return the share of pairs of a right and a wrong response in which the right one has the higher score.

    A pair with equal scores counts as 0.  The result is None without such pairs.
    ``scores``, ``correct``: ``[n]`` each.
    """
    right, wrong = scores[correct], np.sort(scores[~correct])
    if not len(right) or not len(wrong):
        return None
    return float(np.searchsorted(wrong, right, side="left").mean() / len(wrong))


def _number(text: str | None) -> float | None:
    try:
        value = float(text or "")
    except ValueError:
        return None
    return value if 0 <= value <= 1 else None
