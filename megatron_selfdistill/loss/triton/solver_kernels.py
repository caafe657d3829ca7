# Copyright (c) 2026 the megatron_selfdistill authors. Apache-2.0.
# mypy: disable-error-code="assignment, misc"
# ruff: noqa: RUF005
"""The formulas of the solver for the Triton kernels, with the solver's names.

Twin: `sharded/solver.py`.
All arithmetic is float64, one token per element.  A point is a tuple of the fields of `solver.Cumulants`: (beta,
log_sum, mean, variance, third).
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from megatron_selfdistill.loss.sharded import solver
from megatron_selfdistill.loss.status import MIN_ENTROPY
from megatron_selfdistill.loss.triton.kernel_math import as_float32, at_least, at_most, is_finite, log_one_plus_64

_LEAST_ENTROPY = tl.constexpr(solver.LEAST_ENTROPY)
_LEAST_DEFICIT = tl.constexpr(solver.LEAST_DEFICIT)
_LONGEST_STEP = tl.constexpr(solver.LONGEST_STEP)
_ESTIMATE_TOLERANCE, _MIN_ENTROPY = tl.constexpr(solver.ESTIMATE_TOLERANCE), tl.constexpr(MIN_ENTROPY)
_SNAP, _SNAP_LIMIT = tl.constexpr(solver.SNAP), tl.constexpr(solver.SNAP_LIMIT)
_EPS = tl.constexpr(torch.finfo(torch.float32).eps)


@triton.jit
def cumulants(beta, tail, first, second, third):
    """Compute `Cumulants.from_sums`."""
    total = 1 + tail
    mean, square, cube = first / total, second / total, third / total
    return (
        beta + tl.zeros_like(mean),
        log_one_plus_64(tail),
        mean,
        square - mean * mean,
        cube - 3 * mean * square + 2 * mean * mean * mean,
    )


@triton.jit
def entropy_of(point):
    """Compute `Cumulants.entropy`."""
    return point[1] - point[0] * point[2]


@triton.jit
def extrapolated(here, beta):
    """Compute `Cumulants.extrapolated`: log S0 and H."""
    _, log_sum, mean, variance, third = here
    step = beta - here[0]
    log_sum = log_sum + step * (mean + step * (variance / 2 + step * third / 6))
    return log_sum, log_sum - beta * (mean + step * (variance + step * third / 2))


@triton.jit
def nothing_yet(like):
    """Return the state of `with_point` before the first point of the grid."""
    zero = tl.zeros_like(like)
    point = (zero, zero, zero, zero, zero)
    return (zero, zero, zero), point, point, point, (zero, zero, zero), zero + 1e9


@triton.jit
def with_point(solved, point, wanted_entropy, distance, is_first):
    """Return the state of the search on the grid after one more point of the grid.

    The state holds the first point, the last point so far, both ends of the first cell in which H falls below H(p), the
    point that matches to rounding (`solver.SNAP`), and the distance of this point from the favoured point.
    The points come one at a time: all points of a grid would not fit into registers.
    """
    first, last, left, right, match, nearest = solved
    wanted, entropy = at_least(wanted_entropy, _MIN_ENTROPY), entropy_of(point)
    crosses = (entropy_of(last) > wanted) & ~(entropy > wanted) & (left[0] == 0) & ~is_first
    noise = _SNAP * _EPS * (entropy + point[0] * point[0] * point[3])
    matches = (tl.abs(entropy - wanted) <= at_most(noise, _SNAP_LIMIT)) & (distance < nearest)
    return (
        where(is_first, point[:3], first),
        point,
        where(crosses, last, left),
        where(crosses, point, right),
        where(matches, point[:3], match),
        tl.where(matches, distance, nearest),
    )


@triton.jit
def on_grid(solved, wanted_entropy, max_entropy, GIVEN: tl.constexpr):
    """Compute `solver.solve_on_grid`: beta, log_sum, left, right, inside."""
    first, last, left, right, match, nearest = solved
    if GIVEN:
        beta, log_sum, inside = last[0], last[1], last[0] != last[0]
    else:
        wanted = at_least(wanted_entropy, _MIN_ENTROPY)
        soft, hard, matches = entropy_of(first) > wanted, ~(entropy_of(last) > wanted), nearest < 1e9
        root = as_float32(root_between(left, right, wanted, max_entropy))
        point = where(matches, match, where(soft, last[:3], first))
        finite = is_finite(wanted_entropy + entropy_of(first))
        inside = soft & hard & ~matches & finite
        beta = tl.where(finite, tl.where(inside, root, point[0]), float("nan"))
        log_sum = tl.where(inside, log_sum_between(left, right, root), point[1])
        log_sum = tl.where(finite, log_sum, float("nan"))
    return beta, log_sum, left, right, inside


@triton.jit
def refined(here, left, right, inside, wanted_entropy, max_entropy):
    """Compute `BetaSolution.refined`: beta, log_sum, entropy, left, right, converged."""
    wanted = at_least(wanted_entropy, _MIN_ENTROPY)
    soft = entropy_of(here) > wanted
    left, right = where(soft, here, left), where(soft, right, here)
    root = root_between(left, right, wanted, max_entropy)
    # The root is NaN where the entropy does not change to float64 precision.
    root = tl.where(inside & (root == root), root, here[0])
    is_near = tl.abs(tl.log(root / here[0])) <= _LONGEST_STEP
    agrees = tl.abs(extrapolated(here, root)[1] - wanted) <= _ESTIMATE_TOLERANCE
    beta = as_float32(root)
    log_sum, entropy = extrapolated(here, beta)
    return beta, log_sum, entropy, left, right, ~inside | (is_near & agrees)


@triton.jit
def where(condition, a, b):
    """Return tl.where of each pair of elements of two tuples."""
    out = ()
    for i in tl.static_range(len(a)):
        out = out + (tl.where(condition, a[i], b[i]),)
    return out


@triton.jit
def root_between(left, right, wanted, max_entropy):
    """Compute `solver._root_between`."""
    floor, width = _floor(left, right), tl.log(right[0] / left[0])
    f0, d0, c0 = _mismatch(left, floor, wanted, max_entropy)
    f1, d1, c1 = _mismatch(right, floor, wanted, max_entropy)
    curve = _quintic(f0, d0 * width, c0 * width * width, f1, d1 * width, c1 * width * width)
    low, high = tl.zeros_like(width), tl.zeros_like(width) + 1
    at_low, at_high = f0, f1
    for _ in range(12):
        middle = (low + high) / 2
        value = _value(curve, middle)
        soft = value > 0
        low, high = tl.where(soft, middle, low), tl.where(soft, high, middle)
        at_low, at_high = tl.where(soft, value, at_low), tl.where(soft, at_high, value)
    fraction = at_low / (at_low - at_high)
    fraction = at_most(at_least(tl.where(fraction == fraction, fraction, 0.5), 0.0), 1.0)
    return left[0] * tl.exp((low + (high - low) * fraction) * width)


@triton.jit
def _floor(left, right):
    """Compute `solver._floor`."""
    fall, bend = right[0] * right[3], -(right[3] + right[0] * right[4])
    least = fall / (right[0] - left[0])
    steepest = at_least(tl.where(bend > least, bend, least), _LEAST_ENTROPY)
    return at_least(entropy_of(right) - fall * fall / steepest, 0.0)


@triton.jit
def _mismatch(point, floor, wanted, max_entropy):
    """Compute `solver._mismatch`: G(H) - G(wanted), and its first two derivatives."""
    beta, _, _, variance, third = point
    entropy = entropy_of(point)
    excess, deficit = at_least(entropy - floor, _LEAST_ENTROPY), at_least(max_entropy - entropy, _LEAST_DEFICIT)
    v = beta * beta * variance
    first, second = -v, -(2 * v + beta * beta * beta * third)
    a, b = first / excess, first / deficit
    goal = tl.log(at_least(wanted - floor, _LEAST_ENTROPY)) - tl.log(at_least(max_entropy - wanted, _LEAST_DEFICIT))
    return tl.log(excess) - tl.log(deficit) - goal, a + b, second / excess - a * a + second / deficit + b * b


@triton.jit
def log_sum_between(left, right, beta):
    """Compute `solver._log_sum_between`."""
    step = right[0] - left[0]
    square = step * step
    curve = _quintic(left[1], left[2] * step, left[3] * square, right[1], right[2] * step, right[3] * square)
    return _value(curve, (beta - left[0]) / step)


@triton.jit
def _quintic(f0, d0, c0, f1, d1, c1):
    """Compute `solver._quintic`."""
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
    """Compute `solver._value`."""
    value = curve[5]
    for i in tl.static_range(5):
        value = curve[4 - i] + value * x
    return value
