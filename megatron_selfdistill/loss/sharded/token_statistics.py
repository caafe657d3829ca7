# Copyright (c) 2026 the megatron_selfdistill authors. Apache-2.0.
"""From the sums of all vocabulary shards to the statistics of whole rows: float64 on [T, J] numbers.

Every rank computes this from the same gathered sums, so every rank gets the same bits.
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
    """What `TokenStats` reports of every row, [T] each, and the constants for the passes at the final beta.

    In the dtype of the sums but for beta and log_normaliser (of `TargetSolution`), which are float64.
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
    """Every row between two passes; ``constants`` is what the next one takes.

    final, unconverged: after the second pass, the values at ``solution.beta`` and [T] the rows that need a third.
    """

    rows: MergedSums
    solution: BetaSolution
    constants: TokenConstants
    final: ValuesAtBeta | None = None
    unconverged: Tensor | None = None


def solve_tokens(gathered: Tensor, grid: BetaGrid) -> SolverState:
    """Merge the parts of ``first_pass``, [parts, T, ...] in rank order, and find the beta of every row on the grid."""
    rows = MergedSums.merge(gathered.double(), grid)
    if grid.given:
        solution = BetaSolution.given(rows.mix.at(torch.full_like(rows.student.argmax, len(grid.betas) - 1).long()))
    else:
        solution = solve_on_grid(
            rows.mix, rows.student.entropy, rows.max_entropy, favoured=grid.favoured, dtype=grid.dtype
        )
    return SolverState(rows, solution, rows.constants(solution.beta, solution.log_sum, grid.dtype))


def finish_tokens(
    solver_state: SolverState, gathered: Tensor, grid: BetaGrid, response_tokens: Tensor | None, vocab_size: int
) -> tuple[TokenResults, SolverState]:
    """Merge the parts of ``second_pass``, [parts, T, ...], move beta to the root, and report every row.

    After the third pass, which is ``second_pass`` at the constants that this returns, it is called once more: rows that
    are UNCONVERGED take another step, the others stay.
    Without ``response_tokens`` the three log-probs are NaN.
    """
    rows, dtype = solver_state.rows, grid.dtype
    solution, final = _moved(solver_state, gathered.double(), dtype)
    if solver_state.final is not None and solver_state.unconverged is not None:
        solution = solution.where(solver_state.unconverged, solver_state.solution)
        final = final.where(solver_state.unconverged, solver_state.final)
    if response_tokens is None:
        response_tokens = torch.full_like(solution.beta, -1, dtype=torch.int64)
    log_probs = rows.log_probs(response_tokens, solution.beta, solution.log_sum, vocab_size)
    student_log_prob, teacher_log_prob, target_log_prob = (value.to(dtype) for value in log_probs)
    status = status_given(solution.beta)
    if not grid.given:
        ends = grid.betas[0], grid.betas[grid.num_grid - 1]
        status = token_status(
            rows.student.entropy, final.entropy, solution.beta, *ends, grid.lowest_is_bound, ~solution.converged
        )
    highest = mixed_logits(rows.student.maximum, rows.teacher.maximum, *grid.mix_weights) + rows.mix_max
    constants = rows.constants(solution.beta, solution.log_sum, dtype)
    results = TokenResults(
        constants=constants,
        beta=solution.beta,
        log_normaliser=solution.beta * highest + solution.log_sum,
        reverse_kl=final.reverse_kl.to(dtype),
        forward_kl=final.forward_kl.to(dtype),
        student_entropy=rows.student.entropy.to(dtype),
        teacher_entropy=rows.teacher.entropy.to(dtype),
        target_entropy=final.entropy.to(dtype),
        status=status,
        student_log_prob=student_log_prob,
        teacher_log_prob=teacher_log_prob,
        target_log_prob=target_log_prob,
        top1_agreement=rows.top1_agreement,
        grid_entropies=rows.mix.entropy[:, : grid.num_grid].to(dtype),
    )
    return results, SolverState(rows, solution, constants, final, status == Status.UNCONVERGED)


@dataclass(frozen=True)
class Softmax:
    """Student or teacher over the whole vocabulary, [T] float64 each.

    log_sum: log of the normaliser relative to the maximum; argmax: the lowest column at the maximum.
    """

    maximum: Tensor
    log_sum: Tensor
    entropy: Tensor
    argmax: Tensor

    @classmethod
    def merge(cls, maximum: Tensor, tail: Tensor, first: Tensor, argmax: Tensor) -> Softmax:
        """From the parts' maxima, sums and argmaxes, [parts, T] each."""
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
    """What the first pass says about every row, over the whole vocabulary, in float64.

    mix: [T, J] of x at every beta of the grid.
    mix_max: [T] max of w z + y, with y and z relative to the maxima of s and t; x is relative to it.
    shift: [parts, T] the maximum of x in each part.
    max_entropy: [T] log of the number of columns with m > -inf.
    one_sided: [T] bool: whether some column exists for p only; for q only.
    token_logits: [T] the student's and the teacher's logit of the response token.
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
        """From [parts, T, FIRST_PASS + grid.num_sums]."""
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
        # Rounded to what the passes over the logits can subtract, and taken as the reference from here on.
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
        return (self.student.argmax == self.teacher.argmax) & torch.isfinite(self.student.argmax)

    def constants(self, beta: Tensor, log_sum: Tensor, dtype: torch.dtype) -> TokenConstants:
        """For the passes over the logits at this beta."""
        student = self.student
        values = (student.maximum, self.teacher.maximum, self.mix_max, student.log_sum, beta, log_sum)
        return TokenConstants(*(value.to(dtype) for value in values))

    def log_probs(
        self, tokens: Tensor, beta: Tensor, log_sum: Tensor, vocab_size: int
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Of the response token, under student, teacher and target."""
        y, z = self.token_logits[0] - self.student.maximum, self.token_logits[1] - self.teacher.maximum
        x = mixed_logits(y, z, *self.mix_weights) - self.mix_max
        log_probs = (y - self.student.log_sum, z - self.teacher.log_sum, beta * x - log_sum)
        unknown = (tokens < 0) | (tokens >= vocab_size)
        first, second, third = (value.masked_fill(unknown, torch.nan) for value in log_probs)
        return first, second, third


def _merge_moments(moments: tuple[Tensor, ...], shift: Tensor, beta: Tensor) -> Cumulants:
    """The cumulants of x, from the parts' S0 - 1, S1, S2, S3 relative to their own maxima."""
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
    """What belongs to the beta in use, [T] float64 each."""

    entropy: Tensor
    reverse_kl: Tensor
    forward_kl: Tensor

    def where(self, condition: Tensor, others: ValuesAtBeta) -> ValuesAtBeta:
        """Return these where ``condition`` holds, elsewhere ``others``."""
        pairs = zip(vars(self).values(), vars(others).values(), strict=True)
        return ValuesAtBeta(*(torch.where(condition, ours, theirs) for ours, theirs in pairs))


def _moved(solver_state: SolverState, gathered: Tensor, dtype: torch.dtype) -> tuple[BetaSolution, ValuesAtBeta]:
    """The next beta and what belongs to it, from [parts, T, SECOND_PASS or its longer form] at the present one."""
    rows, beta, assumed = solver_state.rows, solver_state.solution.beta, solver_state.constants.log_sum.double()
    names = SECOND_PASS if gathered.shape[2] == len(SECOND_PASS) else SECOND_PASS_FORWARD
    part = dict(zip(names, gathered.sum(0).unbind(1), strict=True))
    shift, scale = rows.shift, assumed.exp()
    tops = (beta * shift).exp()
    tail, *sums = (
        scale * part[name] + (tops * shift**power).sum(0)
        for power, name in enumerate(("tail", "first", "second", "third"))
    )
    # Each part's largest column stands in ``tops``, and the largest of all is 1.
    here = Cumulants.from_sums(beta, tail - 1, *sums)
    solution = solver_state.solution.refined(here, rows.student.entropy, rows.max_entropy, dtype)
    step, rise = solution.beta - beta, solution.log_sum - here.log_sum
    log_ratio = here.log_sum - assumed  # log of the sum of q as this pass normalised it

    # Each divergence is taken at ``beta``, then moved: KL(p || q) = log S0 - beta E_p[x] + const,
    # KL(q || p) = -H(q) - E_q[y] + const.
    reverse_kl = part["reverse_kl"] - log_ratio.expm1() + log_ratio
    reverse_kl += rise - step * part["student_mean"]
    forward_kl = torch.zeros_like(reverse_kl)
    if "forward_kl" in part:
        forward_kl = (part["forward_kl"] + log_ratio.expm1()) * (-log_ratio).exp() - log_ratio
        mean_y = _taylor_of_mean_y(here, [part[f"y{k}"] * (-log_ratio).exp() for k in range(4)], step)
        forward_kl += here.entropy - solution.entropy - mean_y
    only_student, only_target = rows.one_sided
    final = ValuesAtBeta(
        entropy=solution.entropy.clamp(min=0),
        reverse_kl=_infinite_where(only_student, reverse_kl.clamp(min=0)),
        forward_kl=_infinite_where(only_target, forward_kl.clamp(min=0)),
    )
    return solution, final


def _infinite_where(one_sided: Tensor, kl: Tensor) -> Tensor:
    """NaN stays: a row with NaN has no countable columns."""
    return kl.masked_fill(one_sided & ~torch.isnan(kl), torch.inf)


def _taylor_of_mean_y(here: Cumulants, moments: list[Tensor], step: Tensor) -> Tensor:
    """E_q[y] at beta + step minus E_q[y] at beta, from E_q[y x^k], k = 0 .. 3: its derivatives are joint cumulants."""
    y0, y1, y2, y3 = moments
    mean = here.mean
    first = y1 - mean * y0
    second = y2 - 2 * mean * y1 + mean**2 * y0 - y0 * here.variance
    third = y3 - 3 * mean * y2 + 3 * mean**2 * y1 - mean**3 * y0 - y0 * here.third - 3 * here.variance * first
    return step * (first + step * (second / 2 + step * third / 6))
