# Copyright (c) 2026 the megatron_selfdistill authors. Apache-2.0.
"""The solver for beta = 1 / k: moment sums of the mix in, the beta with H(softmax(beta m)) = H(p) out.

With x = m - max m, S_k = sum e^(beta x) x^k, u = log beta, and mu, Var, k3, k4 the cumulants of x under
softmax(beta x), v = beta^2 Var:

    H = log S0 - beta mu
    dH/du = -v,  d2H/du2 = -(2 v + beta^3 k3),  d3H/du3 = -(4 v + 5 beta^3 k3 + beta^4 k4)

The unknown is sought on the logit-entropy G(u) = log H - log(Hmax - H), nearly a straight line for H -> 0
and for H -> Hmax = log(number of valid columns).  A quintic Hermite polynomial between two neighbours of a
grid of betas gives a first value; one step of the Newton-Halley-Householder family, there, polishes it.

All arithmetic is elementwise in float64, without communication: ranks with the same sums get the same bits.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from megatron_selfdistill.loss.target import MIN_ENTROPY

LEAST_ENTROPY = 1e-30
LEAST_DEFICIT = 1e-12
"""Floors of H and Hmax - H inside logarithms, far below what float32 sums can tell from 0."""
SNAP = 4.0
"""A grid point whose entropy equals H(p) to this many rounding errors is the root.

So equal logits give beta (1 + w) = 1 exactly."""
SNAP_LIMIT = 5e-6
"""Nats; the largest mismatch that counts as rounding."""


@dataclass(frozen=True)
class Cumulants:
    """Of x under softmax(beta x), in any shape: log-normaliser, mean, variance, third cumulant."""

    log_sum: Tensor
    mean: Tensor
    variance: Tensor
    third: Tensor

    @classmethod
    def from_sums(cls, tail: Tensor, first: Tensor, second: Tensor, third: Tensor) -> Cumulants:
        """From S0 - 1, S1, S2, S3.  Without its largest term, 1, S0 keeps the digits of a very sure row."""
        total = 1 + tail
        mean, square, cube = first / total, second / total, third / total
        return cls(tail.log1p(), mean, square - mean * mean, cube - 3 * mean * square + 2 * mean**3)

    def entropy(self, beta: Tensor) -> Tensor:
        """H of softmax(beta x), in nats."""
        return self.log_sum - beta * self.mean

    def fourth(self, square: Tensor, cube: Tensor, fourth_power: Tensor) -> Tensor:
        """The fourth cumulant, from E[x^2], E[x^3] and E[x^4]."""
        mean = self.mean
        central = fourth_power - 4 * mean * cube + 6 * mean**2 * square - 3 * mean**4
        return central - 3 * self.variance**2

    def at(self, index: Tensor) -> Cumulants:
        """Those of one grid point per row: [T, J] and index [T] -> [T]."""
        pick = [t.gather(1, index[:, None]).squeeze(1) for t in (self.log_sum, self.mean, self.variance, self.third)]
        return Cumulants(*pick)


@dataclass(frozen=True)
class GridSolution:
    """The first value of beta, per token, float64.

    beta: the root of the polynomial, or an end of the grid, or a grid point that matches to rounding.
    log_sum: estimate of log S0 there, to about 1e-4; exact at grid points.
    lowest, highest: the ends of the cell that holds the root.
    inside: bool; only such tokens are polished.
    """

    beta: Tensor
    log_sum: Tensor
    lowest: Tensor
    highest: Tensor
    inside: Tensor

    @classmethod
    def given(cls, beta: Tensor, log_sum: Tensor) -> GridSolution:
        """A beta that is not solved for."""
        nowhere = torch.zeros_like(beta, dtype=torch.bool)
        return cls(beta, log_sum, beta, beta, nowhere)


def solve_on_grid(
    betas: Sequence[float],
    cumulants: Cumulants,
    student_entropy: Tensor,
    max_entropy: Tensor,
    *,
    favoured: int,
    dtype: torch.dtype,
) -> GridSolution:
    """Invert the entropies on the grid, per token.

    betas: the J >= 2 rising values at which ``cumulants`` [T, J] were taken.
    student_entropy, max_entropy: [T] float64.
    favoured: of several grid points that match to rounding the one nearest to this index is taken.
    dtype: that of the sums behind them; sets what counts as a rounding error, and beta is rounded to it.
    H(p) is raised to MIN_ENTROPY first.  A root outside the grid gives the nearer end; NaN in gives NaN out.
    """
    grid = torch.tensor(betas, dtype=torch.float64, device=student_entropy.device)
    wanted = student_entropy.clamp(min=MIN_ENTROPY)
    f, slope, curvature = _mismatch(cumulants, grid, wanted[:, None], max_entropy[:, None])
    cell = ((f > 0).sum(1) - 1).clamp(0, len(betas) - 2)
    lowest, highest = grid[cell], grid[cell + 1]
    beta = _root_in_cell(f, slope, curvature, cell, lowest, highest).to(dtype).double()
    log_sum = _log_sum_in_cell(
        cumulants.at(cell), cumulants.at(cell + 1), highest - lowest, (beta - lowest) / (highest - lowest)
    )

    # A grid point that matches to rounding is the root; without a root in the grid, its end is.
    entropies = cumulants.entropy(grid)
    noise = SNAP * torch.finfo(dtype).eps * (entropies + grid**2 * cumulants.variance)
    matches = (entropies - wanted[:, None]).abs() <= noise.clamp(max=SNAP_LIMIT)
    distance = (torch.arange(len(betas), device=grid.device) - favoured).abs()
    nearest = torch.where(matches, distance, len(betas)).argmin(1)
    has_match, has_root = matches.any(1), (f[:, 0] > 0) & (f[:, -1] <= 0)
    end = torch.where(f[:, 0] > 0, len(betas) - 1, 0)
    point = torch.where(has_match, nearest, end)
    inside = has_root & ~has_match
    broken = ~torch.isfinite(student_entropy + entropies[:, 0])
    return GridSolution(
        beta=torch.where(inside, beta, grid[point]).masked_fill(broken, torch.nan),
        log_sum=torch.where(inside, log_sum, pick(cumulants.log_sum, point)).masked_fill(broken, torch.nan),
        lowest=lowest,
        highest=highest,
        inside=inside & ~broken,
    )


@dataclass(frozen=True)
class Polished:
    """The final beta and, there, log S0 and mu of x; [T] float64."""

    beta: Tensor
    log_sum: Tensor
    mean: Tensor


def polish(
    solution: GridSolution,
    here: Cumulants,
    fourth: Tensor,
    student_entropy: Tensor,
    max_entropy: Tensor,
    *,
    dtype: torch.dtype,
) -> Polished:
    """One step on the logit-entropy by Householder's method of third order, the next after Newton and Halley.

    here, fourth: the cumulants of x at ``solution.beta``, the fourth one by itself; all [T] float64.
    The step ends within the token's cell, at a beta that ``dtype`` can hold; tokens not inside the grid stay.
    Halley's step, which needs no fourth cumulant, leaves 2e-5 nats where a bulk of columns melts within one
    cell (V = 50000); this one leaves 7e-7.
    """
    beta = solution.beta
    f, slope, curvature = _mismatch(here, beta, student_entropy.clamp(min=MIN_ENTROPY), max_entropy)
    third = _third_derivative(here, fourth, beta, max_entropy)
    newton, bend, twist = -f / slope, curvature / slope, third / slope
    ratio = (1 + bend * newton / 2) / (1 + bend * newton + twist * newton**2 / 6)
    factor = (newton * ratio.clamp(0.5, 2.0)).exp()
    moved = torch.minimum(torch.maximum(beta * factor, solution.lowest), solution.highest).to(dtype).double()
    # factor NaN: an entropy that does not move to float64 precision, nothing to polish
    step = torch.where(solution.inside & ~torch.isnan(factor), moved - beta, torch.zeros_like(beta))
    return Polished(
        beta=beta + step,
        log_sum=here.log_sum
        + step * (here.mean + step * (here.variance / 2 + step * (here.third / 6 + step * fourth / 24))),
        mean=here.mean + step * (here.variance + step * (here.third / 2 + step * fourth / 6)),
    )


def _mismatch(cumulants: Cumulants, beta: Tensor, wanted: Tensor, max_entropy: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """G(H) - G(wanted), and its first two derivatives with respect to log beta."""
    entropy = cumulants.entropy(beta).clamp(min=LEAST_ENTROPY)
    deficit = (max_entropy - entropy).clamp(min=LEAST_DEFICIT)
    v = beta**2 * cumulants.variance
    first, second = -v, -(2 * v + beta**3 * cumulants.third)
    slope = first / entropy + first / deficit
    curvature = second / entropy - (first / entropy) ** 2 + second / deficit + (first / deficit) ** 2
    goal = wanted.log() - (max_entropy - wanted).clamp(min=LEAST_DEFICIT).log()
    return entropy.log() - deficit.log() - goal, slope, curvature


def _third_derivative(here: Cumulants, fourth: Tensor, beta: Tensor, max_entropy: Tensor) -> Tensor:
    """Of G with respect to log beta."""
    entropy = here.entropy(beta).clamp(min=LEAST_ENTROPY)
    deficit = (max_entropy - entropy).clamp(min=LEAST_DEFICIT)
    v, skew = beta**2 * here.variance, beta**3 * here.third
    first, second, third = -v, -(2 * v + skew), -(4 * v + 5 * skew + beta**4 * fourth)

    def of_logarithm(a: Tensor, b: Tensor, c: Tensor) -> Tensor:
        """(log g)''' from a = g' / g, b = g'' / g, c = g''' / g."""
        return c - 3 * a * b + 2 * a**3

    return of_logarithm(first / entropy, second / entropy, third / entropy) - of_logarithm(
        -first / deficit, -second / deficit, -third / deficit
    )


def _root_in_cell(f: Tensor, slope: Tensor, curvature: Tensor, cell: Tensor, lowest: Tensor, highest: Tensor) -> Tensor:
    width = (highest / lowest).log()
    ends = [pick(values, cell + side) * width**k for side in (0, 1) for k, values in enumerate((f, slope, curvature))]
    curve = _quintic(*ends)
    left, right = torch.zeros_like(lowest), torch.ones_like(lowest)
    at_left, at_right = ends[0], ends[3]
    for _ in range(12):
        middle = (left + right) / 2
        value = _value(curve, middle)
        soft = value > 0
        left, right = torch.where(soft, middle, left), torch.where(soft, right, middle)
        at_left, at_right = torch.where(soft, value, at_left), torch.where(soft, at_right, value)
    # the bracket is 2^-12 wide, where the polynomial is a straight line to 1e-8
    fraction = (at_left / (at_left - at_right)).nan_to_num(0.5).clamp(0, 1)
    return lowest * ((left + (right - left) * fraction) * width).exp()


def _log_sum_in_cell(left: Cumulants, right: Cumulants, step: Tensor, x: Tensor) -> Tensor:
    """log S0 at x in [0, 1] between two grid points ``step`` apart; its derivatives are the cumulants."""
    ends = [(c.log_sum, c.mean * step, c.variance * step**2) for c in (left, right)]
    return _value(_quintic(*ends[0], *ends[1]), x)


def cubic(
    start: Tensor, slope: Tensor, end: Tensor, end_slope: Tensor, left: Tensor, right: Tensor, x: Tensor
) -> Tensor:
    """At x, the cubic with these values and slopes at left and right."""
    step = right - left
    rise, first, last = end - start, slope * step, end_slope * step
    return _value((start, first, 3 * rise - 2 * first - last, first + last - 2 * rise), (x - left) / step)


def _quintic(f0: Tensor, d0: Tensor, c0: Tensor, f1: Tensor, d1: Tensor, c1: Tensor) -> tuple[Tensor, ...]:
    """Coefficients on [0, 1] of the polynomial with these values, slopes and curvatures at its ends."""
    rest, rest_slope, rest_curvature = f1 - f0 - d0 - c0 / 2, d1 - d0 - c0, c1 - c0
    return (
        f0,
        d0,
        c0 / 2,
        10 * rest - 4 * rest_slope + rest_curvature / 2,
        -15 * rest + 7 * rest_slope - rest_curvature,
        6 * rest - 3 * rest_slope + rest_curvature / 2,
    )


def _value(coefficients: Sequence[Tensor], x: Tensor) -> Tensor:
    value = coefficients[-1]
    for coefficient in reversed(coefficients[:-1]):
        value = torch.addcmul(coefficient, value, x)
    return value


def pick(values: Tensor, index: Tensor) -> Tensor:
    """[T, J] and index [T] -> [T]."""
    return values.gather(1, index[:, None]).squeeze(1)
