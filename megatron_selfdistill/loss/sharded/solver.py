# Copyright (c) 2026 the megatron_selfdistill authors. Apache-2.0.
"""The solver for beta = 1 / k: from cumulants of the mix to the beta with H(softmax(beta m)) = H(p).

With x = m - max m, S_k = sum e^(beta x) x^k, u = log beta, and mu, Var, k3 the cumulants of x under softmax(beta x):

    H = log S0 - beta mu,    dH/du = -beta^2 Var,    d2H/du2 = -(2 beta^2 Var + beta^3 k3)

The root lies in a bracket, between two betas at which these numbers are known: first two neighbours of the grid, then
one of the two and the beta of the last pass.  The solver looks for the root of

    G(u) = log(H - floor) - log(Hmax - H),    Hmax = log(number of valid columns)

which is nearly a straight line in three cases: where a bulk of columns melts (H -> Hmax), where all mass runs to one
column (floor = 0, H -> 0), and where H settles on a plateau because two or three best columns are nearly tied over a
small tail.
On a plateau, H - floor decays exponentially in beta.  The rate is H'' / |H'| (derivatives with respect to beta) at the
right end, or 1 / (distance of the ends) where this is larger.  ``floor`` is the limit of H at this rate, H - |H'| /
rate, but at least 0.
A quintic Hermite polynomial through G, G' and G'' at both ends is inverted.

All arithmetic is elementwise in float64, without communication: ranks with the same sums get the same bits.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from megatron_selfdistill.loss.status import MIN_ENTROPY

LEAST_ENTROPY = 1e-30
LEAST_DEFICIT = 1e-12
"""The smallest H and the smallest Hmax - H inside logarithms, far below what float32 sums can distinguish from 0."""
SNAP = 4.0
"""The number of rounding errors up to which the entropy of a grid point counts as equal to H(p); this grid point is
then the root.

Therefore equal logits give beta (1 + w) = 1 exactly."""
SNAP_LIMIT = 5e-6
"""The largest mismatch, in nats, that counts as rounding."""
ESTIMATE_TOLERANCE = 2e-6
"""The largest difference, in nats, between two estimates of H at the root of a token that has converged.

float32 then rounds beta by 6e-8 of dH/du, which is below 5e-6."""
LONGEST_STEP = 1 / 32
"""The largest step of log beta, from the beta of a pass to the beta in use, for which the series of log S0, H and
E_q[log p] are trusted.

Only forks take longer steps, up to 0.1, of which the last one loses 1e-5; 0.007 is the longest on the other classes of
``tools/benchmarks/solver_accuracy.py``."""


@dataclass(frozen=True)
class Cumulants:
    """The cumulants of x under softmax(beta x), in any shape.

    log_sum: log S0; mean, variance, third: the first three cumulants.
    """

    beta: Tensor
    log_sum: Tensor
    mean: Tensor
    variance: Tensor
    third: Tensor

    @classmethod
    def from_sums(cls, beta: Tensor, tail: Tensor, first: Tensor, second: Tensor, third: Tensor) -> Cumulants:
        """Return the cumulants for S0 - 1, S1, S2, S3.

        S0 comes without its largest term, which is 1, so that an almost certain token keeps its digits.
        """
        total = 1 + tail
        mean, square, cube = first / total, second / total, third / total
        third_cumulant = cube - 3 * mean * square + 2 * mean**3
        return cls(beta.expand_as(mean), tail.log1p(), mean, square - mean * mean, third_cumulant)

    @property
    def entropy(self) -> Tensor:
        """H of softmax(beta x), in nats."""
        return self.log_sum - self.beta * self.mean

    def tensors(self) -> tuple[Tensor, ...]:
        """Return the five fields in their order."""
        return self.beta, self.log_sum, self.mean, self.variance, self.third

    def at(self, index: Tensor) -> Cumulants:
        """Return the cumulants at one grid point per token: [T, J] and index [T] -> [T]."""
        return Cumulants(*(pick(values, index) for values in self.tensors()))

    def where(self, condition: Tensor, others: Cumulants) -> Cumulants:
        """Return these cumulants where ``condition`` holds, elsewhere the cumulants ``others``."""
        pairs = zip(self.tensors(), others.tensors(), strict=True)
        return Cumulants(*(torch.where(condition, ours, theirs) for ours, theirs in pairs))

    def extrapolated(self, beta: Tensor) -> tuple[Tensor, Tensor]:
        """Return log S0 and H at a near ``beta``, by the series up to the third cumulant."""
        step = beta - self.beta
        log_sum = self.log_sum + step * (self.mean + step * (self.variance / 2 + step * self.third / 6))
        mean = self.mean + step * (self.variance + step * self.third / 2)
        return log_sum, log_sum - beta * mean


@dataclass(frozen=True)
class BetaSolution:
    """The present knowledge about the beta of every token, [T] float64.

    beta: the root of the polynomial, an end of the grid, a grid point that matches to rounding, or the given beta.
    log_sum: log S0 there: exact at grid points, to 1e-4 inside a cell of the grid, to 1e-7 after a pass near it.
    entropy: H there, as exact as log_sum.
    left, right: both ends of the bracket that holds the root.
    inside: bool; the tokens whose root lies inside their bracket.
    converged: bool; |H - H(p)| at ``beta`` is known to be at most MATCH_TOLERANCE; True where not inside.
    """

    beta: Tensor
    log_sum: Tensor
    entropy: Tensor
    left: Cumulants
    right: Cumulants
    inside: Tensor
    converged: Tensor

    @classmethod
    def given(cls, point: Cumulants) -> BetaSolution:
        """Return the solution for a beta that the rule gives."""
        inside = torch.zeros_like(point.beta, dtype=torch.bool)
        return cls(point.beta, point.log_sum, point.entropy, point, point, inside, ~inside)

    def where(self, condition: Tensor, others: BetaSolution) -> BetaSolution:
        """Return the betas of this solution where ``condition`` holds, elsewhere the betas of ``others``."""
        return replace(
            self,
            beta=torch.where(condition, self.beta, others.beta),
            log_sum=torch.where(condition, self.log_sum, others.log_sum),
            entropy=torch.where(condition, self.entropy, others.entropy),
            converged=torch.where(condition, self.converged, others.converged),
        )

    def refined(self, here: Cumulants, wanted_entropy: Tensor, max_entropy: Tensor, dtype: torch.dtype) -> BetaSolution:
        """Return the solution after a pass over the logits at ``beta``, at which the cumulants are ``here``.

        The bracket shrinks to the side of ``beta`` on which the root lies.  The new beta is the root of the polynomial
        through both ends of the bracket, rounded to ``dtype``.
        Two estimates of H at the root, by the polynomial and by the series around ``here``, share no error: a token has
        converged when both agree to ESTIMATE_TOLERANCE at a distance of at most LONGEST_STEP.
        Tokens that are not inside keep their beta.
        """
        wanted = wanted_entropy.clamp(min=MIN_ENTROPY)
        soft = here.entropy > wanted
        left, right = here.where(soft, self.left), self.right.where(soft, here)
        root = _root_between(left, right, wanted, max_entropy)
        # The root is NaN where the entropy does not change to float64 precision.
        root = torch.where(self.inside & ~torch.isnan(root), root, here.beta)
        is_near = (root / here.beta).log().abs() <= LONGEST_STEP
        agrees = (here.extrapolated(root)[1] - wanted).abs() <= ESTIMATE_TOLERANCE
        beta = root.to(dtype).double()
        log_sum, entropy = here.extrapolated(beta)
        return BetaSolution(beta, log_sum, entropy, left, right, self.inside, ~self.inside | (is_near & agrees))


def solve_on_grid(
    grid: Cumulants, wanted_entropy: Tensor, max_entropy: Tensor, *, favoured: int, dtype: torch.dtype
) -> BetaSolution:
    """Return the beta of every token, by inverting the entropies on the grid.

    grid: [T, J], at J >= 2 rising betas.
    wanted_entropy, max_entropy: [T] float64.
    favoured: where several grid points match to rounding, the point nearest to this index is the root.
    dtype: the dtype of the sums behind the cumulants; it sets the size of a rounding error, and beta is rounded to it.
    H(p) is raised to MIN_ENTROPY first.  A root outside the grid gives the nearer end; NaN gives NaN.
    """
    num_betas, entropies = grid.beta.shape[1], grid.entropy
    wanted = wanted_entropy.clamp(min=MIN_ENTROPY)
    soft = entropies > wanted[:, None]
    cell = ((~soft).int().argmax(1) - 1).clamp(0, num_betas - 2)
    left, right = grid.at(cell), grid.at(cell + 1)
    root = _root_between(left, right, wanted, max_entropy).to(dtype).double()

    # A grid point that matches to rounding is the root; where the grid holds no root, beta is the nearer end.
    noise = SNAP * torch.finfo(dtype).eps * (entropies + grid.beta**2 * grid.variance)
    matches = (entropies - wanted[:, None]).abs() <= noise.clamp(max=SNAP_LIMIT)
    distance = (torch.arange(num_betas, device=wanted.device) - favoured).abs()
    nearest = torch.where(matches, distance, num_betas).argmin(1)
    has_match, has_root = matches.any(1), soft[:, 0] & ~soft[:, -1]
    point = grid.at(torch.where(has_match, nearest, torch.where(soft[:, 0], num_betas - 1, 0)))
    broken = ~torch.isfinite(wanted_entropy + entropies[:, 0])
    inside = has_root & ~has_match & ~broken
    return BetaSolution(
        beta=torch.where(inside, root, point.beta).masked_fill(broken, torch.nan),
        log_sum=torch.where(inside, _log_sum_between(left, right, root), point.log_sum).masked_fill(broken, torch.nan),
        entropy=torch.where(inside, wanted, point.entropy),
        left=left,
        right=right,
        inside=inside,
        converged=~inside,
    )


def _root_between(left: Cumulants, right: Cumulants, wanted: Tensor, max_entropy: Tensor) -> Tensor:
    """Return the beta at which the quintic polynomial through both ends reaches the wanted entropy."""
    floor = _floor(left, right)
    width = (right.beta / left.beta).log()
    ends = []
    for point in (left, right):
        height, slope, curvature = _mismatch(point, floor, wanted, max_entropy)
        ends += [height, slope * width, curvature * width**2]
    curve = _quintic(*ends)
    low, high = torch.zeros_like(wanted), torch.ones_like(wanted)
    at_low, at_high = ends[0], ends[3]
    for _ in range(12):
        middle = (low + high) / 2
        value = _value(curve, middle)
        soft = value > 0
        low, high = torch.where(soft, middle, low), torch.where(soft, high, middle)
        at_low, at_high = torch.where(soft, value, at_low), torch.where(soft, at_high, value)
    # The bracket is 2^-12 wide: on it the polynomial is a straight line to 1e-8.
    fraction = (at_low / (at_low - at_high)).nan_to_num(0.5).clamp(0, 1)
    return left.beta * ((low + (high - low) * fraction) * width).exp()


def _floor(left: Cumulants, right: Cumulants) -> Tensor:
    """Return the limit of H beyond ``right`` if H goes on decaying as it does at ``right``.

    The decay is at least by a factor of e between the two ends.
    """
    fall = right.beta * right.variance
    bend = -(right.variance + right.beta * right.third)
    steepest = torch.maximum(bend, fall / (right.beta - left.beta)).clamp(min=LEAST_ENTROPY)
    return (right.entropy - fall * fall / steepest).clamp(min=0)


def _mismatch(point: Cumulants, floor: Tensor, wanted: Tensor, max_entropy: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Return G(H) - G(wanted), and its first two derivatives with respect to log beta."""
    excess = (point.entropy - floor).clamp(min=LEAST_ENTROPY)
    deficit = (max_entropy - point.entropy).clamp(min=LEAST_DEFICIT)
    v = point.beta**2 * point.variance
    first, second = -v, -(2 * v + point.beta**3 * point.third)
    slope = first / excess + first / deficit
    curvature = second / excess - (first / excess) ** 2 + second / deficit + (first / deficit) ** 2
    goal = (wanted - floor).clamp(min=LEAST_ENTROPY).log() - (max_entropy - wanted).clamp(min=LEAST_DEFICIT).log()
    return excess.log() - deficit.log() - goal, slope, curvature


def _log_sum_between(left: Cumulants, right: Cumulants, beta: Tensor) -> Tensor:
    """Return log S0 by the quintic polynomial through both ends; its derivatives are the cumulants."""
    step = right.beta - left.beta
    ends = [(point.log_sum, point.mean * step, point.variance * step**2) for point in (left, right)]
    return _value(_quintic(*ends[0], *ends[1]), (beta - left.beta) / step)


def _quintic(f0: Tensor, d0: Tensor, c0: Tensor, f1: Tensor, d1: Tensor, c1: Tensor) -> tuple[Tensor, ...]:
    """Return the coefficients, on [0, 1], of the polynomial with these values, slopes and curvatures at its ends."""
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
    """Return the value of the polynomial at x."""
    value = coefficients[-1]
    for coefficient in reversed(coefficients[:-1]):
        value = torch.addcmul(coefficient, value, x)
    return value


def pick(values: Tensor, index: Tensor) -> Tensor:
    """Return one of J values per token: [T, J] and index [T] -> [T]."""
    return values.gather(1, index[:, None]).squeeze(1)
