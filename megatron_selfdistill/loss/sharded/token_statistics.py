# Copyright (c) 2026 the megatron_selfdistill authors. Apache-2.0.
"""The statistics of tokens from the sums of all vocabulary shards, in float64 on [T, J] numbers.

Every rank computes the statistics from the same gathered sums, so every rank gets the same bits.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from megatron_selfdistill.loss.divergence import FLOOR
from megatron_selfdistill.loss.sharded.beta_grid import BetaGrid
from megatron_selfdistill.loss.sharded.shard_sums import FIRST_PASS, SECOND_PASS, SECOND_PASS_FORWARD, TokenConstants
from megatron_selfdistill.loss.sharded.solver import BetaSolution, Cumulants, solve_on_grid
from megatron_selfdistill.loss.status import Status, status_given, token_status
from megatron_selfdistill.loss.target import mixed_logits


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
    unconverged = status == Status.UNCONVERGED
    return results, SolverState(sums, solver_state.wanted, solution, constants, final, unconverged)


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
        lowest = torch.where(maximum == top, argmax, torch.inf).amin(0)
        return cls(top, log_sum, entropy.clamp(min=0), lowest)


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
        sides = [
            Softmax.merge(*(column[f"{side}_{name}"] for name in ("max", "tail", "first", "argmax")))
            for side in ("student", "teacher")
        ]
        student, teacher = sides
        local = [
            torch.where(torch.isneginf(column[name]), 0.0, column[name]) for name in ("student_max", "teacher_max")
        ]
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
    final = ValuesAtBeta(
        entropy=solution.entropy.clamp(min=0),
        reverse_kl=_infinite_where(only_student, reverse_kl.clamp(min=0)),
        forward_kl=_infinite_where(only_target, forward_kl.clamp(min=0)),
    )
    return solution, final


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
