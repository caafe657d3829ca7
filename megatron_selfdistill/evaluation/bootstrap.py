# Copyright (c) 2026 the megatron_selfdistill authors. Apache-2.0.
"""The uncertainty of a mean over problems: the percentile bootstrap, which resamples the problems."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

NUM_RESAMPLES = 10_000
# Elements of one temporary: resamples are processed in groups of this size.
_MAX_ELEMENTS = 2**22
_ROUNDING = 1e-12


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
    Raises: ValueError for fewer than 2 problems.
    """
    if values.ndim != 2 or len(values) < 2:
        raise ValueError(
            f"bootstrap: expected values [num_problems, num_columns] of at least 2 problems, got {values.shape}."
        )
    means = resampled_means(values, num_resamples, seed)
    lows, highs = np.quantile(means, [0.025, 0.975], axis=0)
    # A sum of equal and opposite floats may miss 0 by its rounding.
    not_above = (means <= _ROUNDING).mean(axis=0)
    columns = zip(values.mean(axis=0), lows, highs, not_above, strict=True)
    return [Interval(*map(float, column)) for column in columns]


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
