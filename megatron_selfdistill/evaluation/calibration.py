# Copyright (c) 2026 the megatron_selfdistill authors. Apache-2.0.
"""The calibration of a model: whether the confidence in a response says how often such responses are right."""

from __future__ import annotations

import math
import re
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

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
    """Return the number in [0, 1] that a text is; None for other texts."""
    try:
        value = float(text or "")
    except ValueError:
        return None
    return value if 0 <= value <= 1 else None
