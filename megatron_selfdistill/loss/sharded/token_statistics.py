# Copyright (c) 2026 the megatron_selfdistill authors. Apache-2.0.
"""The statistics of tokens from the sums of all vocabulary shards, and the solver for beta = 1 / k.

The solver goes from cumulants of the mix to the beta with H(softmax(beta m)) = H(p).
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

All arithmetic is elementwise in float64, on [T, J] numbers and without communication.  Every rank computes the
statistics from the same gathered sums, so every rank gets the same bits.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from megatron_selfdistill.loss.divergence import FLOOR
from megatron_selfdistill.loss.sharded.shard_sums import (
    FIRST_PASS,
    SECOND_PASS,
    SECOND_PASS_FORWARD,
    BetaGrid,
    TokenConstants,
)
from megatron_selfdistill.loss.target import MIN_ENTROPY, Status, mixed_logits, status_given, token_status

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
``tests/support/distributions.py``."""


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


@dataclass(frozen=True)
class TokenResults:
    """The numbers that `TokenStats` reports of every token, [T] each, and the constants for passes at the final beta.

    All are in the dtype of the sums, except for beta and log_normaliser (see `TargetSolution`), which are float64.
    """

    constants: TokenConstants
    beta: Tensor
    log_normaliser: Tensor
    reverse_kl: Tensor
    forward_kl: Tensor
    student_entropy: Tensor
    teacher_entropy: Tensor
    target_entropy: Tensor
    status: Tensor
    student_log_prob: Tensor
    teacher_log_prob: Tensor
    target_log_prob: Tensor
    top1_agreement: Tensor
    grid_entropies: Tensor


@dataclass(frozen=True)
class SolverState:
    """Every token between two passes.

    sums: the merged sums of the first pass.
    wanted: [T] float64, the entropy that beta is to give to the target.
    constants: the input of the next pass.
    final: after the second pass, the values at ``solution.beta``.
    unconverged: after the second pass, [T] bool, the tokens that need a third pass.
    """

    sums: MergedSums
    wanted: Tensor
    solution: BetaSolution
    constants: TokenConstants
    final: ValuesAtBeta | None = None
    unconverged: Tensor | None = None


def solve_tokens(gathered: Tensor, grid: BetaGrid, reference_entropy: Tensor | None = None) -> SolverState:
    """Merge the parts of ``first_pass``, and find the beta of every token on the grid.

    gathered: [parts, T, ...] in rank order.
    reference_entropy: [T] the entropy that the target is to have; None is the student's.
    """
    sums = MergedSums.merge(gathered.double(), grid)
    wanted = sums.student.entropy if reference_entropy is None else reference_entropy.double()
    if grid.given:
        solution = BetaSolution.given(sums.mix.at(torch.full_like(sums.student.argmax, len(grid.betas) - 1).long()))
    else:
        solution = solve_on_grid(sums.mix, wanted, sums.max_entropy, favoured=grid.favoured, dtype=grid.dtype)
    return SolverState(sums, wanted, solution, sums.constants(solution.beta, solution.log_sum, grid.dtype))


def finish_tokens(
    solver_state: SolverState, gathered: Tensor, grid: BetaGrid, response_tokens: Tensor | None, vocab_size: int
) -> tuple[TokenResults, SolverState]:
    """Merge the parts of ``second_pass``, move beta to the root, and report every token.

    gathered: [parts, T, ...] in rank order.
    The third pass is ``second_pass`` at the constants of the returned state.  After it this function is called once
    more: tokens that are UNCONVERGED take another step, and the others stay.
    response_tokens: [T] global ids; None: the three log-probs are NaN.
    """
    sums, dtype = solver_state.sums, grid.dtype
    solution, final = _moved(solver_state, gathered.double(), dtype)
    if solver_state.final is not None and solver_state.unconverged is not None:
        solution = solution.where(solver_state.unconverged, solver_state.solution)
        final = final.where(solver_state.unconverged, solver_state.final)
    if response_tokens is None:
        response_tokens = torch.full_like(solution.beta, -1, dtype=torch.int64)
    log_probs = sums.log_probs(response_tokens, solution.beta, solution.log_sum, vocab_size)
    student_log_prob, teacher_log_prob, target_log_prob = (value.to(dtype) for value in log_probs)
    status = status_given(solution.beta)
    if not grid.given:
        ends = grid.betas[0], grid.betas[grid.num_grid - 1]
        status = token_status(
            solver_state.wanted, final.entropy, solution.beta, *ends, grid.lowest_is_bound, ~solution.converged
        )
    highest = mixed_logits(sums.student.maximum, sums.teacher.maximum, *grid.mix_weights) + sums.mix_max
    constants = sums.constants(solution.beta, solution.log_sum, dtype)
    results = TokenResults(
        constants=constants,
        beta=solution.beta,
        log_normaliser=solution.beta * highest + solution.log_sum,
        reverse_kl=final.reverse_kl.to(dtype),
        forward_kl=final.forward_kl.to(dtype),
        student_entropy=sums.student.entropy.to(dtype),
        teacher_entropy=sums.teacher.entropy.to(dtype),
        target_entropy=final.entropy.to(dtype),
        status=status,
        student_log_prob=student_log_prob,
        teacher_log_prob=teacher_log_prob,
        target_log_prob=target_log_prob,
        top1_agreement=sums.top1_agreement,
        grid_entropies=sums.mix.entropy[:, : grid.num_grid].to(dtype),
    )
    return results, SolverState(sums, solver_state.wanted, solution, constants, final, status == Status.UNCONVERGED)


@dataclass(frozen=True)
class Softmax:
    """A softmax of the student's or the teacher's logits over the whole vocabulary, [T] float64 each.

    log_sum: log of the normaliser relative to the maximum; argmax: the lowest column at the maximum.
    """

    maximum: Tensor
    log_sum: Tensor
    entropy: Tensor
    argmax: Tensor

    @classmethod
    def merge(cls, maximum: Tensor, tail: Tensor, first: Tensor, argmax: Tensor) -> Softmax:
        """Merge the maxima, sums and argmaxes of the parts, [parts, T] each."""
        top = maximum.amax(0)
        shift = (maximum - top).clamp(min=FLOOR)
        weight, total = shift.exp(), 1 + tail
        whole_tail = (weight * total).sum(0) - 1
        log_sum = whole_tail.log1p()
        entropy = log_sum - (weight * (first + shift * total)).sum(0) / (1 + whole_tail)
        return cls(top, log_sum, entropy.clamp(min=0), torch.where(maximum == top, argmax, torch.inf).amin(0))


@dataclass(frozen=True)
class MergedSums:
    """The sums of the first pass over the whole vocabulary, in float64.

    student, teacher: the softmax of each.
    mix: [T, J] the cumulants of x at every beta of the grid.
    mix_max: [T] max of w z + y, with y and z relative to the maxima of s and t; x is relative to mix_max.
    shift: [parts, T] the maximum of x in each part.
    max_entropy: [T] log of the number of columns with m > -inf.
    one_sided: [T] bool each: whether some column exists for p only, and for q only.
    token_logits: [T] each: the student's and the teacher's logit of the response token.
    mix_weights: (weight of t, weight of s) in m.
    """

    student: Softmax
    teacher: Softmax
    mix: Cumulants
    mix_max: Tensor
    shift: Tensor
    max_entropy: Tensor
    one_sided: tuple[Tensor, Tensor]
    token_logits: tuple[Tensor, Tensor]
    mix_weights: tuple[float, float]

    @classmethod
    def merge(cls, gathered: Tensor, grid: BetaGrid) -> MergedSums:
        """Merge the parts [parts, T, len(FIRST_PASS) + grid.num_sums] of the first pass."""
        column = dict(zip(FIRST_PASS, gathered.unbind(2), strict=False))
        student, teacher = (
            Softmax.merge(*(column[f"{side}_{name}"] for name in ("max", "tail", "first", "argmax")))
            for side in ("student", "teacher")
        )
        local = [column[name].masked_fill(column[name].isneginf(), 0.0) for name in ("student_max", "teacher_max")]
        local_max = mixed_logits(local[0], local[1], *grid.mix_weights) + column["mix_max"]
        reference = mixed_logits(student.maximum, teacher.maximum, *grid.mix_weights)
        # Rounded to the dtype in which the passes subtract it; everything below refers to the rounded number.
        mix_max = (local_max.amax(0) - reference).to(grid.dtype).double()
        shift = (local_max - (reference + mix_max)).clamp(min=FLOOR)

        betas = grid.on(gathered.device, torch.float64)
        moments = gathered[:, :, len(FIRST_PASS) : -2].reshape(*gathered.shape[:2], len(betas), 4).unbind(3)
        num_student, num_mix, num_both = (column[name].sum(0) for name in ("num_student", "num_mix", "num_both"))
        return cls(
            student=student,
            teacher=teacher,
            mix=_merge_moments(moments, shift[:, :, None], betas),
            mix_max=mix_max,
            shift=shift,
            max_entropy=num_mix.log(),
            one_sided=(num_student > num_both, num_mix > num_both),
            token_logits=(gathered[:, :, -2].sum(0), gathered[:, :, -1].sum(0)),
            mix_weights=grid.mix_weights,
        )

    @property
    def top1_agreement(self) -> Tensor:
        """[T] bool: whether student and teacher have the same argmax."""
        return (self.student.argmax == self.teacher.argmax) & torch.isfinite(self.student.argmax)

    def constants(self, beta: Tensor, log_sum: Tensor, dtype: torch.dtype) -> TokenConstants:
        """Return the constants for passes over the logits at this beta, in ``dtype``."""
        student = self.student
        values = (student.maximum, self.teacher.maximum, self.mix_max, student.log_sum, beta, log_sum)
        return TokenConstants(*(value.to(dtype) for value in values))

    def log_probs(
        self, tokens: Tensor, beta: Tensor, log_sum: Tensor, vocab_size: int
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Return the log-prob of the response token under student, teacher and target, [T] each.

        tokens: [T] global ids; a token outside of 0 .. vocab_size - 1 gives NaN.
        """
        y, z = self.token_logits[0] - self.student.maximum, self.token_logits[1] - self.teacher.maximum
        x = mixed_logits(y, z, *self.mix_weights) - self.mix_max
        log_probs = (y - self.student.log_sum, z - self.teacher.log_sum, beta * x - log_sum)
        unknown = (tokens < 0) | (tokens >= vocab_size)
        first, second, third = (value.masked_fill(unknown, torch.nan) for value in log_probs)
        return first, second, third


def _merge_moments(moments: tuple[Tensor, ...], shift: Tensor, beta: Tensor) -> Cumulants:
    """Return the cumulants of x, from the parts' S0 - 1, S1, S2, S3 relative to their own maxima."""
    tail, s1, s2, s3 = moments
    s0, weight = 1 + tail, (beta * shift).exp()
    return Cumulants.from_sums(
        beta,
        (weight * s0).sum(0) - 1,
        (weight * (s1 + shift * s0)).sum(0),
        (weight * (s2 + shift * (2 * s1 + shift * s0))).sum(0),
        (weight * (s3 + shift * (3 * s2 + shift * (3 * s1 + shift * s0)))).sum(0),
    )


@dataclass(frozen=True)
class ValuesAtBeta:
    """The entropy of the target and the divergences at the beta in use, [T] float64 each."""

    entropy: Tensor
    reverse_kl: Tensor
    forward_kl: Tensor

    def where(self, condition: Tensor, others: ValuesAtBeta) -> ValuesAtBeta:
        """Return these values where ``condition`` holds, elsewhere the values ``others``."""
        pairs = zip(vars(self).values(), vars(others).values(), strict=True)
        return ValuesAtBeta(*(torch.where(condition, ours, theirs) for ours, theirs in pairs))


def _moved(solver_state: SolverState, gathered: Tensor, dtype: torch.dtype) -> tuple[BetaSolution, ValuesAtBeta]:
    """Return the next beta, and the entropy and divergences at it.

    gathered: [parts, T, SECOND_PASS or SECOND_PASS_FORWARD], summed at the beta of ``solver_state``.
    """
    sums, beta, assumed = solver_state.sums, solver_state.solution.beta, solver_state.constants.log_sum.double()
    names = SECOND_PASS if gathered.shape[2] == len(SECOND_PASS) else SECOND_PASS_FORWARD
    part = dict(zip(names, gathered.sum(0).unbind(1), strict=True))
    shift, scale = sums.shift, assumed.exp()
    tops = (beta * shift).exp()
    tail, *moments = (
        scale * part[name] + (tops * shift**power).sum(0)
        for power, name in enumerate(("tail", "first", "second", "third"))
    )
    # ``tops`` has the largest column of each part; the largest of all parts is 1.
    here = Cumulants.from_sums(beta, tail - 1, *moments)
    solution = solver_state.solution.refined(here, solver_state.wanted, sums.max_entropy, dtype)
    step, rise = solution.beta - beta, solution.log_sum - here.log_sum
    log_ratio = here.log_sum - assumed  # log of the sum of q with the normaliser of this pass

    # Each divergence is computed at ``beta`` and then moved: KL(p || q) = log S0 - beta E_p[x] + const,
    # KL(q || p) = -H(q) - E_q[y] + const.
    reverse_kl = part["reverse_kl"] - log_ratio.expm1() + log_ratio
    reverse_kl += rise - step * part["student_mean"]
    forward_kl = torch.zeros_like(reverse_kl)
    if "forward_kl" in part:
        forward_kl = (part["forward_kl"] + log_ratio.expm1()) * (-log_ratio).exp() - log_ratio
        mean_y = _taylor_of_mean_y(here, [part[f"y{k}"] * (-log_ratio).exp() for k in range(4)], step)
        forward_kl += here.entropy - solution.entropy - mean_y
    only_student, only_target = sums.one_sided
    return solution, ValuesAtBeta(
        entropy=solution.entropy.clamp(min=0),
        reverse_kl=_infinite_where(only_student, reverse_kl.clamp(min=0)),
        forward_kl=_infinite_where(only_target, forward_kl.clamp(min=0)),
    )


def _infinite_where(one_sided: Tensor, kl: Tensor) -> Tensor:
    """Return ``kl``, with +inf for one-sided tokens.

    NaN stays NaN: the columns of a row with NaN cannot be counted.
    """
    return kl.masked_fill(one_sided & ~torch.isnan(kl), torch.inf)


def _taylor_of_mean_y(here: Cumulants, moments: list[Tensor], step: Tensor) -> Tensor:
    """Return E_q[y] at beta + step minus E_q[y] at beta, by a Taylor series whose derivatives are joint cumulants.

    moments: E_q[y x^k] for k = 0 .. 3.
    """
    y0, y1, y2, y3 = moments
    mean = here.mean
    first = y1 - mean * y0
    second = y2 - 2 * mean * y1 + mean**2 * y0 - y0 * here.variance
    third = y3 - 3 * mean * y2 + 3 * mean**2 * y1 - mean**3 * y0 - y0 * here.third - 3 * here.variance * first
    return step * (first + step * (second / 2 + step * third / 6))
