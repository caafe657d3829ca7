# Copyright (c) 2026 the megatron_selfdistill authors. Apache-2.0.
"""Downsampled curves keep the extremes of every bucket, the ends, and values that are not finite."""

from __future__ import annotations

import math
import random

import pytest

from megatron_selfdistill.report.downsampling import Curve, curve_of


def test_a_short_curve_keeps_every_value():
    assert curve_of([1, 2, 5], [0.1234567, -3.0, math.nan]) == Curve([1, 2, 5], [0.12346, -3.0, None], [], [])


@pytest.mark.parametrize("length", [1201, 1999, 10_000])
def test_a_long_curve_keeps_a_spike_of_one_step_in_both_directions_and_its_ends(length):
    rng = random.Random(length)
    values = [rng.uniform(0.4, 0.6) for _ in range(length)]
    values[length // 3], values[length // 2] = 77.0, -77.0
    steps = list(range(10, 10 + length))
    curve = curve_of(steps, values)
    assert len(curve.steps) <= 1204 and curve.steps == sorted(set(curve.steps))
    at = dict(zip(curve.steps, curve.values, strict=True))
    assert at[10 + length // 3] == 77.0 and at[10 + length // 2] == -77.0
    assert (curve.steps[0], curve.steps[-1]) == (10, 9 + length)
    assert all(value == pytest.approx(values[step - 10], rel=1e-4) for step, value in at.items())


def test_every_bucket_keeps_its_extremes_and_its_mean():
    rng = random.Random(0)
    values = [rng.gauss(0, 1) for _ in range(4000)]
    curve = curve_of(range(4000), values, max_points=20)
    kept = dict(zip(curve.steps, curve.values, strict=True))
    for bucket in range(10):
        part = range(400 * bucket, 400 * bucket + 400)
        inside = [value for step, value in kept.items() if step in part]
        assert max(inside) == pytest.approx(max(values[i] for i in part), rel=1e-4)
        assert min(inside) == pytest.approx(min(values[i] for i in part), rel=1e-4)
        assert curve.mean_steps[bucket] == part[-1]
        assert curve.means[bucket] == pytest.approx(sum(values[i] for i in part) / 400, rel=1e-4)


def test_values_that_are_not_finite_stay_as_gaps_and_do_not_hide_the_others():
    values = [1.0] * 4000
    values[2000], values[2001], values[2002] = math.inf, math.nan, 9.0
    values[400:800] = [math.nan] * 400
    curve = curve_of(range(4000), values, max_points=20)
    kept = dict(zip(curve.steps, curve.values, strict=True))
    assert kept[2000] is None and kept[2002] == 9.0 and kept[400] is None
    assert curve.means[1] is None and curve.means[5] == pytest.approx((397 + 9) / 398, rel=1e-4)


def test_the_block_has_steps_as_differences():
    assert Curve([3, 4, 10], [1.0, None, 2.0], [10], [1.5]).block() == [[3, 1, 6], [1.0, None, 2.0], [10], [1.5]]
