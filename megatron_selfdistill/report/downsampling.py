# Copyright (c) 2026 the megatron_selfdistill authors. Apache-2.0.
"""Curves with fewer points that keep every extreme: the smallest and the largest value of each bucket of steps."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

MAX_POINTS = 1200
"""The largest number of points of a curve in a report; longer curves are downsampled."""
_DIGITS = 5  # significant digits of a value in a report


@dataclass(frozen=True)
class Curve:
    """The values of one metric over the steps of a run, as a report shows them."""

    steps: list[int]
    """The steps of the points, ascending."""
    values: list[float | None]
    """The values at these steps, to 5 significant digits; None for NaN and infinities."""
    mean_steps: list[int]
    """The last steps of the buckets; empty if every value is a point."""
    means: list[float | None]
    """The means of the finite values of the buckets, which a smoothed curve uses; None without a finite value."""

    def block(self) -> list[list[int] | list[float | None]]:
        """Return the curve as JSON: steps, values, steps of the means, means; steps as differences from the last."""
        return [_differences(self.steps), self.values, _differences(self.mean_steps), self.means]


def curve_of(steps: Sequence[int], values: Sequence[float], max_points: int = MAX_POINTS) -> Curve:
    """Return the curve of ``values`` at ascending ``steps``, with at most ``max_points`` + 4 points.

    A longer curve is cut into buckets of equally many values.  A bucket keeps its smallest and its largest finite value
    and its first value that is not finite, at their own steps.  The first and the last value of the curve stay, too.
    """
    if len(steps) <= max_points:
        return Curve(list(steps), [_short(value) for value in values], [], [])
    num_buckets = max(1, max_points // 2)
    kept, mean_steps, means = {0, len(steps) - 1}, [], []
    for bucket in range(num_buckets):
        start, end = (len(steps) * b // num_buckets for b in (bucket, bucket + 1))
        finite = [i for i in range(start, end) if math.isfinite(values[i])]
        if finite:
            kept |= {min(finite, key=values.__getitem__), max(finite, key=values.__getitem__)}
        if len(finite) < end - start:
            kept.add(next(i for i in range(start, end) if not math.isfinite(values[i])))
        mean_steps.append(steps[end - 1])
        means.append(_short(sum(values[i] for i in finite) / len(finite)) if finite else None)
    places = sorted(kept)
    return Curve([steps[i] for i in places], [_short(values[i]) for i in places], mean_steps, means)


def _short(value: float) -> float | None:
    return float(f"{value:.{_DIGITS}g}") if math.isfinite(value) else None


def _differences(steps: Sequence[int]) -> list[int]:
    return [step - before for before, step in zip([0, *steps], steps, strict=False)]
