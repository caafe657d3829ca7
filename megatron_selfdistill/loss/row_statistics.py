# Copyright (c) 2026 the megatron_selfdistill authors. Apache-2.0.
"""From the sums of all vocabulary shards to the statistics of whole rows: float64 on [T, J] numbers.

Every rank computes this from the same gathered sums, so every rank gets the same bits.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from megatron_selfdistill.loss.divergence import FLOOR
from megatron_selfdistill.loss.entropy_match import (
    Cumulants,
    GridSolution,
    cubic,
    pick,
    polish,
    solve_on_grid,
)
from megatron_selfdistill.loss.grid import Grid
from megatron_selfdistill.loss.row_sums import FIRST_PASS, SECOND_PASS, SECOND_PASS_FORWARD, RowConstants
from megatron_selfdistill.loss.target import MIN_ENTROPY, mixed_logits, status_given, token_status


@dataclass(frozen=True)
class RowResults:
    """What `TokenStats` reports of every row, [T] each, and the constants for the passes at the final beta.

    In the dtype of the sums but for beta and log_normaliser (of `TargetSolution`), which are float64.
    """

    constants: RowConstants
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
class Solving:
    """Every row between the two passes; ``constants`` is what the second one takes."""

    rows: Rows
    solution: GridSolution
    constants: RowConstants


def solve_rows(gathered: Tensor, grid: Grid) -> Solving:
    """Merge the parts of ``first_pass``, [parts, T, ...] in rank order, and find the beta of every row on the grid."""
    rows = Rows.merge(gathered.double(), grid)
    solution = _first_solution(rows, grid)
    return Solving(rows, solution, rows.constants(solution.beta, solution.log_sum, grid.dtype))


def _first_solution(rows: Rows, grid: Grid) -> GridSolution:
    if grid.given:
        beta = torch.full_like(rows.student.entropy, grid.betas[-1])
        return GridSolution.given(beta, rows.mix.log_sum[:, -1])
    return solve_on_grid(
        grid.betas, rows.mix, rows.student.entropy, rows.max_entropy, favoured=grid.favoured, dtype=grid.dtype
    )


def finish_rows(
    solving: Solving, gathered: Tensor, grid: Grid, response_tokens: Tensor | None, vocab_size: int
) -> RowResults:
    """Merge the parts of ``second_pass``, [parts, T, ...], polish beta there, and say what there is to say.

    Without ``response_tokens`` the three log-probs are NaN.
    """
    final = Final.polish(solving.solution, solving.rows, gathered.double(), solving.constants, grid.dtype)
    return _results(solving.rows, final, grid, response_tokens, vocab_size)


def finish_in_one_pass(gathered: Tensor, grid: Grid, response_tokens: Tensor | None, vocab_size: int) -> RowResults:
    """As `solve_rows` and then `finish_rows`, from the parts of a ``first_pass`` with ``grid.one_pass`` alone."""
    rows = Rows.merge(gathered.double(), grid)
    final = Final.interpolated(_first_solution(rows, grid), rows, grid)
    return _results(rows, final, grid, response_tokens, vocab_size)


def _results(rows: Rows, final: Final, grid: Grid, response_tokens: Tensor | None, vocab_size: int) -> RowResults:
    dtype = grid.dtype
    if response_tokens is None:
        response_tokens = torch.full_like(final.beta, -1, dtype=torch.int64)
    log_probs = rows.log_probs(response_tokens, final.beta, final.log_sum, vocab_size)
    student_log_prob, teacher_log_prob, target_log_prob = (value.to(dtype) for value in log_probs)
    status = status_given(final.beta)
    if not grid.given:
        ends = grid.betas[0], grid.betas[grid.num_grid - 1]
        status = token_status(rows.student.entropy, final.entropy, final.beta, *ends, grid.lowest_is_bound)
    highest = mixed_logits(rows.student.maximum, rows.teacher.maximum, *grid.mix_weights) + rows.mix_max
    return RowResults(
        constants=rows.constants(final.beta, final.log_sum, dtype),
        beta=final.beta,
        log_normaliser=final.beta * highest + final.log_sum,
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
        grid_entropies=rows.grid_entropies[:, : grid.num_grid].to(dtype),
    )


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
class Rows:
    """What the first pass says about every row, over the whole vocabulary, in float64.

    mix: [T, J] of x at every beta; grid_entropies: the same as entropies.
    mix_max: [T] max of w z + y, with y and z relative to the maxima of s and t; x is relative to it.
    shift: [parts, T] the maximum of x in each part.
    max_entropy: [T] log of the number of columns with m > -inf.
    one_sided: [T] bool: whether some column exists for p only; for q only.
    token_logits: [T] the student's and the teacher's logit of the response token.
    student_mean: [T] E_p[x], under ``Grid.one_pass``; mean_y: [T, J] E[y] under softmax(beta x) and its derivative with
        respect to beta, under ``Grid.with_forward_kl``.
    """

    student: Softmax
    teacher: Softmax
    mix: Cumulants
    grid_entropies: Tensor
    mix_max: Tensor
    shift: Tensor
    max_entropy: Tensor
    one_sided: tuple[Tensor, Tensor]
    token_logits: tuple[Tensor, Tensor]
    mix_weights: tuple[float, float]
    student_mean: Tensor | None = None
    mean_y: tuple[Tensor, Tensor] | None = None

    @classmethod
    def merge(cls, gathered: Tensor, grid: Grid) -> Rows:
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

        betas = torch.tensor(grid.betas, dtype=torch.float64, device=gathered.device)
        joint_at = len(FIRST_PASS) + 4 * len(betas)
        moments = gathered[:, :, len(FIRST_PASS) : joint_at].unflatten(2, (len(betas), 4)).unbind(3)
        mix = _merge_moments(moments, shift[:, :, None], betas)
        num_student, num_mix, num_both = (column[name].sum(0) for name in ("num_student", "num_mix", "num_both"))
        return cls(
            student=student,
            teacher=teacher,
            mix=mix,
            grid_entropies=mix.entropy(betas),
            mix_max=mix_max,
            shift=shift,
            max_entropy=num_mix.log(),
            one_sided=(num_student > num_both, num_mix > num_both),
            token_logits=(gathered[:, :, -2].sum(0), gathered[:, :, -1].sum(0)),
            mix_weights=grid.mix_weights,
            student_mean=_merge_student_mean(column, gathered[:, :, joint_at], shift) if grid.one_pass else None,
            mean_y=_merge_mean_y(moments, gathered[:, :, joint_at + 1 : -2], shift, column["student_max"], mix, betas)
            if grid.with_forward_kl
            else None,
        )

    @property
    def top1_agreement(self) -> Tensor:
        return (self.student.argmax == self.teacher.argmax) & torch.isfinite(self.student.argmax)

    def constants(self, beta: Tensor, log_sum: Tensor, dtype: torch.dtype) -> RowConstants:
        """For the passes over the logits at this beta."""
        student = self.student
        values = (student.maximum, self.teacher.maximum, self.mix_max, student.log_sum, beta, log_sum)
        return RowConstants(*(value.to(dtype) for value in values))

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
        (weight * s0).sum(0) - 1,
        (weight * (s1 + shift * s0)).sum(0),
        (weight * (s2 + shift * (2 * s1 + shift * s0))).sum(0),
        (weight * (s3 + shift * (3 * s2 + shift * (3 * s1 + shift * s0)))).sum(0),
    )


def _merge_student_mean(column: dict[str, Tensor], sum_of_x: Tensor, shift: Tensor) -> Tensor:
    """E_p[x] from the parts' sums of e^y x, with y and x relative to their own maxima."""
    maximum, total = column["student_max"], 1 + column["student_tail"]
    weight = (maximum - maximum.amax(0)).clamp(min=FLOOR).exp()
    return (weight * (sum_of_x + shift * total)).sum(0) / (weight * total).sum(0)


def _merge_mean_y(
    moments: tuple[Tensor, ...], joint: Tensor, shift: Tensor, student_max: Tensor, mix: Cumulants, betas: Tensor
) -> tuple[Tensor, Tensor]:
    """E[y] under softmax(beta x), and its derivative Cov(x, y), [T, J] each, from the parts' joint moments."""
    tail, s1, *_ = moments
    s0, (y0, y1) = 1 + tail, joint.unflatten(2, (len(betas), 2)).unbind(3)
    rise = (student_max - student_max.amax(0)).clamp(min=FLOOR)[:, :, None]
    shift = shift[:, :, None]
    weight = (betas * shift).exp() / mix.log_sum.exp()
    mean_y = (weight * (y0 + rise * s0)).sum(0)
    mean_xy = (weight * (y1 + shift * y0 + rise * s1 + shift * rise * s0)).sum(0)
    return mean_y, mean_xy - mix.mean * mean_y


@dataclass(frozen=True)
class Final:
    """The polished beta of every token and what belongs to it; [T] float64."""

    beta: Tensor
    log_sum: Tensor
    entropy: Tensor
    reverse_kl: Tensor
    forward_kl: Tensor

    @classmethod
    def polish(
        cls,
        solution: GridSolution,
        rows: Rows,
        gathered: Tensor,
        constants: RowConstants,
        dtype: torch.dtype,
    ) -> Final:
        """From [parts, T, SECOND_PASS or its longer form], taken at ``solution.beta``."""
        names = SECOND_PASS if gathered.shape[2] == len(SECOND_PASS) else SECOND_PASS_FORWARD
        part = dict(zip(names, gathered.sum(0).unbind(1), strict=True))
        beta, assumed = solution.beta, constants.log_sum.double()
        tops = (beta * rows.shift).exp()
        scale = assumed.exp()
        shift = rows.shift
        tail, *sums = (
            scale * part[name] + (tops * shift**power).sum(0)
            for power, name in enumerate(("tail", "first", "second", "third", "fourth"))
        )
        tail = tail - 1  # each part's largest column stands in ``tops``, and the largest of all is 1
        cumulants = Cumulants.from_sums(tail, *sums[:3])
        fourth = cumulants.fourth(*(value / (1 + tail) for value in sums[1:]))
        polished = polish(solution, cumulants, fourth, rows.student.entropy, rows.max_entropy, dtype=dtype)
        step, rise = polished.beta - beta, polished.log_sum - cumulants.log_sum
        entropy = polished.log_sum - polished.beta * polished.mean
        log_ratio = cumulants.log_sum - assumed  # log of the sum of q as the second pass normalised it

        # Each is taken at solution.beta, then moved: KL(p || q) = log S0 - beta E_p[x] + const,
        # KL(q || p) = -H(q) - E_q[y] + const.
        reverse_kl = part["reverse_kl"] - log_ratio.expm1() + log_ratio
        reverse_kl += rise - step * part["student_mean"]
        forward_kl = torch.zeros_like(reverse_kl)
        if "forward_kl" in part:
            forward_kl = (part["forward_kl"] + log_ratio.expm1()) * (-log_ratio).exp() - log_ratio
            mean_y = _taylor_of_mean_y(cumulants, [part[f"y{k}"] * (-log_ratio).exp() for k in range(4)], step)
            forward_kl += cumulants.entropy(beta) - entropy - mean_y
        only_student, only_target = rows.one_sided
        return cls(
            beta=polished.beta,
            log_sum=polished.log_sum,
            entropy=entropy.clamp(min=0),
            reverse_kl=_infinite_where(only_student, reverse_kl.clamp(min=0)),
            forward_kl=_infinite_where(only_target, forward_kl.clamp(min=0)),
        )

    @classmethod
    def interpolated(cls, solution: GridSolution, rows: Rows, grid: Grid) -> Final:
        """At the solution's beta, by what is known at the points of the grid; exact on them.

        Inside a cell H(q) is what was solved for.  E_q[y] is taken as a cubic in E_q[x], not in beta: where mass melts
        from a few columns into the bulk both follow the share that has, and one is nearly linear in the other.
        """
        beta, log_sum = solution.beta, solution.log_sum
        betas = torch.tensor(grid.betas, dtype=torch.float64, device=beta.device)
        point = len(betas) - 1 if grid.given else (betas - beta[:, None]).abs().argmin(1)
        point = torch.full_like(beta, point, dtype=torch.int64) if isinstance(point, int) else point
        wanted = rows.student.entropy.clamp(min=MIN_ENTROPY)
        entropy = torch.where(solution.inside, wanted, pick(rows.grid_entropies, point))
        forward_kl = torch.zeros_like(beta)
        if rows.mean_y is not None:
            mean_y = pick(rows.mean_y[0], point)
            if not grid.given:
                cell = ((betas <= beta[:, None]).sum(1) - 1).clamp(0, len(betas) - 2)
                inside = _mean_y_in_cell(rows, cell, (log_sum - entropy) / beta)
                mean_y = torch.where(solution.inside, inside, mean_y)
            forward_kl = rows.student.log_sum - mean_y - entropy
        assert rows.student_mean is not None
        reverse_kl = log_sum - beta * rows.student_mean - rows.student.entropy
        only_student, only_target = rows.one_sided
        return cls(
            beta=beta,
            log_sum=log_sum,
            entropy=entropy.clamp(min=0),
            reverse_kl=_infinite_where(only_student, reverse_kl.clamp(min=0)),
            forward_kl=_infinite_where(only_target, forward_kl.clamp(min=0)),
        )


def _mean_y_in_cell(rows: Rows, cell: Tensor, mean: Tensor) -> Tensor:
    """E_q[y] where E_q[x] is ``mean``, by the cubic through both ends of a cell."""
    assert rows.mean_y is not None
    ends = []
    for index in (cell, cell + 1):
        mean_y, covariance = (pick(values, index) for values in rows.mean_y)
        ends.append((pick(rows.mix.mean, index), mean_y, covariance / pick(rows.mix.variance, index)))
    (left, start, first), (right, end, last) = ends
    return cubic(start, first, end, last, left, right, mean)


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
