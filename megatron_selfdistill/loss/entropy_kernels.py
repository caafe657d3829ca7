# Copyright (c) 2026 the megatron_selfdistill authors. Apache-2.0.
# mypy: disable-error-code="assignment, misc"
# ruff: noqa: RUF005
"""The formulas of ``entropy_match`` for the Triton kernels: float64, one row per element, names as there."""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from megatron_selfdistill.loss import entropy_match, target
from megatron_selfdistill.loss.kernel_math import as_float32, at_least, at_most, is_finite, log_one_plus_64

_LEAST_ENTROPY = tl.constexpr(entropy_match.LEAST_ENTROPY)
_LEAST_DEFICIT = tl.constexpr(entropy_match.LEAST_DEFICIT)
_MIN_ENTROPY = tl.constexpr(target.MIN_ENTROPY)
_SNAP, _SNAP_LIMIT = tl.constexpr(entropy_match.SNAP), tl.constexpr(entropy_match.SNAP_LIMIT)
_EPS = tl.constexpr(torch.finfo(torch.float32).eps)


@triton.jit
def cumulants(tail, first, second, third):
    """`Cumulants.from_sums`: (log_sum, mean, variance, third)."""
    total = 1 + tail
    mean, square, cube = first / total, second / total, third / total
    return (
        log_one_plus_64(tail),
        mean,
        square - mean * mean,
        cube - 3 * mean * square + 2 * mean * mean * mean,
    )


@triton.jit
def nothing_yet(like, N: tl.constexpr):
    """What is known of the grid before its first point, of N numbers: see `with_point`."""
    point = ()
    for _ in tl.static_range(N):
        point = point + (tl.zeros_like(like),)
    return _brief(point), point, point, point, _brief(point), tl.zeros_like(like) + 1e9


@triton.jit
def with_point(solved, point, student_entropy, distance, is_first):
    """The first point of the grid, the last one so far, both ends of the cell in which f falls below 0, the point that
    matches to rounding (`entropy_match.SNAP`), and how far that is from the favoured one.

    A point: beta, its cumulants, f with slope and curvature; under ``Grid.one_pass`` also E[y] and its derivative.
    One at a time: all the points of a grid would not fit into registers.
    """
    first, last, left, right, match, nearest = solved
    crosses = (last[5] > 0) & (point[5] <= 0)
    entropy = point[1] - point[0] * point[2]
    noise = _SNAP * _EPS * (entropy + point[0] * point[0] * point[3])
    wanted = at_least(student_entropy, _MIN_ENTROPY)
    matches = (tl.abs(entropy - wanted) <= at_most(noise, _SNAP_LIMIT)) & (distance < nearest)
    return (
        _where(is_first, _brief(point), first),
        point,
        _where(crosses, last, left),
        _where(crosses, point, right),
        _where(matches, _brief(point), match),
        tl.where(matches, distance, nearest),
    )


@triton.jit
def on_grid(solved, student_entropy, GIVEN: tl.constexpr):
    """`entropy_match.solve_on_grid`: beta, log_sum, lowest, highest, inside; and `_brief` where beta is a point."""
    first, last, left, right, match, nearest = solved
    if GIVEN:
        beta, log_sum, lowest, highest = last[0], last[1], last[0], last[0]
        point, inside = _brief(last), last[0] != last[0]
    else:
        soft, hard, matches = first[3] > 0, last[5] <= 0, nearest < 1e9
        inside = soft & hard & ~matches
        lowest, highest = left[0], right[0]
        root = as_float32(root_in_cell(left[5:8], right[5:8], lowest, highest))
        point = _where(matches, match, _where(soft, _brief(last), first))
        sound = is_finite(student_entropy + first[1] - first[0] * first[2])
        beta = tl.where(sound, tl.where(inside, root, point[0]), float("nan"))
        log_sum = log_sum_in_cell(left[1:5], right[1:5], lowest, highest, root)
        log_sum = tl.where(sound, tl.where(inside, log_sum, point[1]), float("nan"))
        inside = inside & sound
    return beta, log_sum, lowest, highest, inside, point


@triton.jit
def _brief(point):
    """beta, log_sum, mean and f of a point, and under ``Grid.one_pass`` E[y]: registers are scarce."""
    return point[0], point[1], point[2], point[5], point[len(point) - 2]


@triton.jit
def _where(condition, a, b):
    out = ()
    for i in tl.static_range(len(a)):
        out = out + (tl.where(condition, a[i], b[i]),)
    return out


@triton.jit
def mismatch(here, beta, student_entropy, max_entropy):
    """`entropy_match._mismatch`: G(H) - G(wanted), and its first two derivatives."""
    log_sum, mean, variance, third = here
    wanted = at_least(student_entropy, _MIN_ENTROPY)
    entropy = at_least(log_sum - beta * mean, _LEAST_ENTROPY)
    deficit = at_least(max_entropy - entropy, _LEAST_DEFICIT)
    v = beta * beta * variance
    slope_of_entropy, curvature_of_entropy = -v, -(2 * v + beta * beta * beta * third)
    a, b = slope_of_entropy / entropy, slope_of_entropy / deficit
    slope = a + b
    curvature = curvature_of_entropy / entropy - a * a + curvature_of_entropy / deficit + b * b
    goal = tl.log(wanted) - tl.log(at_least(max_entropy - wanted, _LEAST_DEFICIT))
    return tl.log(entropy) - tl.log(deficit) - goal, slope, curvature


@triton.jit
def _of_logarithm(a, b, c):
    return c - 3 * a * b + 2 * a * a * a


@triton.jit
def _third_derivative(here, fourth, beta, max_entropy):
    log_sum, mean, variance, third = here
    entropy = at_least(log_sum - beta * mean, _LEAST_ENTROPY)
    deficit = at_least(max_entropy - entropy, _LEAST_DEFICIT)
    v, skew = beta * beta * variance, beta * beta * beta * third
    d1, d2, d3 = -v, -(2 * v + skew), -(4 * v + 5 * skew + beta * beta * beta * beta * fourth)
    of_entropy = _of_logarithm(d1 / entropy, d2 / entropy, d3 / entropy)
    return of_entropy - _of_logarithm(-d1 / deficit, -d2 / deficit, -d3 / deficit)


@triton.jit
def fourth_cumulant(here, square, cube, fourth_power):
    """`Cumulants.fourth`."""
    mean, variance = here[1], here[2]
    mean2 = mean * mean
    return fourth_power - 4 * mean * cube + 6 * mean2 * square - 3 * mean2 * mean2 - 3 * variance * variance


@triton.jit
def polished(here, fourth, beta, lowest, highest, inside, student_entropy, max_entropy):
    """`entropy_match.polish`: (step, log_sum, mean) at beta + step."""
    log_sum, mean, variance, third = here
    f, slope, curvature = mismatch(here, beta, student_entropy, max_entropy)
    newton, bend = -f / slope, curvature / slope
    twist = _third_derivative(here, fourth, beta, max_entropy) / slope
    ratio = (1 + bend * newton / 2) / (1 + bend * newton + twist * newton * newton / 6)
    factor = tl.exp(newton * at_most(at_least(ratio, 0.5), 2.0))
    moved = as_float32(at_most(at_least(beta * factor, lowest), highest))
    # factor NaN: an entropy that does not move to float64 precision, nothing to polish
    step = tl.where(inside & (factor == factor), moved - beta, 0.0)
    return (
        step,
        log_sum + step * (mean + step * (variance / 2 + step * (third / 6 + step * fourth / 24))),
        mean + step * (variance + step * (third / 2 + step * fourth / 6)),
    )


@triton.jit
def root_in_cell(left, right, lowest, highest):
    """`entropy_match._root_in_cell`; left and right: f, slope and curvature at the ends of the cell."""
    width = tl.log(highest / lowest)
    curve = _quintic(
        left[0], left[1] * width, left[2] * width * width, right[0], right[1] * width, right[2] * width * width
    )
    start, end = tl.zeros_like(lowest), tl.zeros_like(lowest) + 1
    at_start, at_end = left[0], right[0]
    for _ in range(12):
        middle = (start + end) / 2
        value = _value(curve, middle)
        soft = value > 0
        start, end = tl.where(soft, middle, start), tl.where(soft, end, middle)
        at_start, at_end = tl.where(soft, value, at_start), tl.where(soft, at_end, value)
    fraction = at_start / (at_start - at_end)
    fraction = at_most(at_least(tl.where(fraction == fraction, fraction, 0.5), 0.0), 1.0)
    return lowest * tl.exp((start + (end - start) * fraction) * width)


@triton.jit
def log_sum_in_cell(left, right, lowest, highest, beta):
    """`entropy_match._log_sum_in_cell`; left and right: the cumulants at the ends of the cell."""
    step = highest - lowest
    curve = _quintic(left[0], left[1] * step, left[2] * step * step, right[0], right[1] * step, right[2] * step * step)
    return _value(curve, (beta - lowest) / step)


@triton.jit
def cubic(start, slope, end, end_slope, left, right, x):
    """`entropy_match.cubic`."""
    step = right - left
    rise, first, last = end - start, slope * step, end_slope * step
    where = (x - left) / step
    return start + where * (first + where * (3 * rise - 2 * first - last + where * (first + last - 2 * rise)))


@triton.jit
def _quintic(f0, d0, c0, f1, d1, c1):
    rest, rest_slope, rest_curvature = f1 - f0 - d0 - c0 / 2, d1 - d0 - c0, c1 - c0
    return (
        f0,
        d0,
        c0 / 2,
        10 * rest - 4 * rest_slope + rest_curvature / 2,
        -15 * rest + 7 * rest_slope - rest_curvature,
        6 * rest - 3 * rest_slope + rest_curvature / 2,
    )


@triton.jit
def _value(curve, x):
    value = curve[5]
    for i in tl.static_range(5):
        value = curve[4 - i] + value * x
    return value
