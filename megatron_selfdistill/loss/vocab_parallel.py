# Copyright (c) 2026 the megatron_selfdistill authors. Apache-2.0.
"""The self-distillation loss with the vocabulary split over a tensor-parallel group; forward and backward written by hand.

Two small all-gathers per call (three for JSD) and none in backward, whatever the number of tokens:

    pass A over the logits -> gather -> solve beta, the same bits on every rank
    pass B over the logits -> gather -> polish beta, divergences          (JSD: one more pass and gather)
    backward: one pass, writes the gradient

Sums are taken in float32 (float64 for float64 logits); merging, solving and polishing run in float64 on [T, J] numbers.
"""

from __future__ import annotations

from dataclasses import dataclass, fields
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from megatron_selfdistill.loss.divergence import FLOOR, Divergence
from megatron_selfdistill.loss.entropy_match import Cumulants, GridSolution, polish, solve_on_grid
from megatron_selfdistill.loss.row_sums import (
    FIRST_PASS,
    SECOND_PASS,
    SECOND_PASS_FORWARD,
    RowConstants,
    Shard,
    first_pass,
    jsd_pass,
    second_pass,
    write_gradient,
)
from megatron_selfdistill.loss.target import Target, beta_grid, mixed_logits, status_given, token_status


@dataclass(frozen=True)
class VocabShard:
    """Which columns of the vocabulary this rank holds.

    start: first global column; size: number of columns here, equal on all ranks of ``group``; vocab_size: valid columns of the whole
    vocabulary, those from there on are padding and take part in nothing; group: the tensor-parallel group, None for one rank.
    """

    start: int
    size: int
    vocab_size: int
    group: dist.ProcessGroup | None = None

    def __post_init__(self) -> None:
        if self.start < 0 or self.size < 1 or not 1 <= self.vocab_size < 2**24:
            raise ValueError(
                "VocabShard needs start >= 0, size >= 1 and 1 <= vocab_size < 2^24 (column indices travel as float32); "
                f"got start={self.start}, size={self.size}, vocab_size={self.vocab_size}."
            )

    @property
    def num_valid(self) -> int:
        """Columns of this shard that are not padding: 0 .. size."""
        return min(self.size, max(0, self.vocab_size - self.start))

    @classmethod
    def from_group(
        cls, padded_vocab_size: int, vocab_size: int, group: dist.ProcessGroup | None
    ) -> VocabShard:
        """The shard of this rank of ``group``, as Megatron splits an output layer: equal, in rank order."""
        tp_size, tp_rank = (1, 0) if group is None else (dist.get_world_size(group), dist.get_rank(group))
        if padded_vocab_size % tp_size or vocab_size > padded_vocab_size:
            raise ValueError(
                f"VocabShard.from_group: padded_vocab_size must be a multiple of the {tp_size} ranks and at least vocab_size "
                f"{vocab_size}; got {padded_vocab_size}."
            )
        size = padded_vocab_size // tp_size
        return cls(tp_rank * size, size, vocab_size, group)


@dataclass
class TokenStats:
    """Everything known about T response tokens; equal on all ranks of the group, float32 (float64 for float64 logits).

    Only ``loss`` carries a gradient, to the student's logits.  Entropies, divergences and log-probs are in nats.
    """

    loss: Tensor
    """[T] the divergence."""
    reverse_kl: Tensor
    """[T] KL(p || q) = KL(student || target), whatever the divergence; +inf where q is 0 at a column where p is not."""
    student_entropy: Tensor
    teacher_entropy: Tensor
    target_entropy: Tensor
    """[T] each."""
    beta: Tensor
    """[T] 1 / k; 1 under teacher_alone, where q = softmax(t)."""
    status: Tensor
    """[T] int64, values of ``Status``."""
    student_log_prob: Tensor
    teacher_log_prob: Tensor
    target_log_prob: Tensor
    """[T] each, of the response token; NaN if that is no valid column."""
    top1_agreement: Tensor
    """[T] bool: student and teacher have the same argmax; of equal maxima the lowest column counts."""
    grid_betas: Tensor
    """[J] the betas at which the mix's entropy was taken: ``beta_grid(target)``."""
    grid_entropies: Tensor
    """[T, J] H(softmax(grid_betas[j] m))."""


def distillation_loss(
    student_logits: Tensor,
    teacher_logits: Tensor,
    response_tokens: Tensor,
    *,
    target: Target,
    divergence: Divergence,
    vocab: VocabShard,
    inplace_backward: bool = False,
) -> TokenStats:
    """The divergence between student and mixed target of every response token, with the vocabulary split over ``vocab.group``.

    Equals ``divergence(log_softmax(s), mixed_target(s, t, target).log_q, divergence)`` on the gathered valid columns.

    Shapes: both logits [T, vocab.size], any float dtype; response_tokens [T] int64, global ids.  T is equal on all ranks of the group.
    Gradient: to ``student_logits`` only, in their dtype; the target is a constant; 0 at padding columns.
    inplace_backward: backward writes the gradient over the student's logits, which nobody may read afterwards.
    Columns of -inf do not exist: -inf in the student (p = q = 0) and in the teacher (q = 0).  Where the teacher says -inf and
    the student does not, reverse KL is +inf, as it equals, and its gradient is not finite: mask such columns in the student or
    use another divergence.  A row with NaN or +inf gives NaN in that row only.
    Cost: two all-gathers (JSD three), none in backward; for T = 0 none.  Temporaries: a chunk of rows; kept for backward: both logits.
    Raises: ValueError if shapes do not fit.
    """
    _check(student_logits, teacher_logits, response_tokens, vocab)
    dtype = torch.promote_types(
        torch.promote_types(student_logits.dtype, teacher_logits.dtype), torch.float32
    )
    with torch.no_grad():
        valid = slice(0, vocab.num_valid)
        shard = Shard(student_logits[:, valid], teacher_logits[:, valid], target.mix_weights, dtype)
        forward = _forward(shard, response_tokens, target, divergence, vocab)
    loss = _HandWrittenBackward.apply(
        student_logits,
        teacher_logits,
        forward.stats.loss,
        forward.constants,
        forward.centre,
        divergence,
        shard,
        inplace_backward,
    )
    forward.stats.loss = loss
    return forward.stats


def _check(
    student_logits: Tensor, teacher_logits: Tensor, response_tokens: Tensor, vocab: VocabShard
) -> None:
    shape = tuple(student_logits.shape)
    if len(shape) != 2 or shape[1] != vocab.size or tuple(teacher_logits.shape) != shape:
        raise ValueError(
            f"distillation_loss: both logits must be [T, {vocab.size}], the columns of this rank's VocabShard; "
            f"got student {shape} and teacher {tuple(teacher_logits.shape)}."
        )
    if tuple(response_tokens.shape) != shape[:1] or response_tokens.dtype != torch.int64:
        raise ValueError(
            f"distillation_loss: response_tokens must be int64 of shape ({shape[0]},), one id per row of logits; "
            f"got {response_tokens.dtype} of shape {tuple(response_tokens.shape)}."
        )


@dataclass(frozen=True)
class _Forward:
    """stats: all of TokenStats; constants and centre: what backward needs, [T] in the dtype of the statistics."""

    stats: TokenStats
    constants: RowConstants
    centre: Tensor


def _forward(
    shard: Shard, response_tokens: Tensor, target: Target, divergence: Divergence, vocab: VocabShard
) -> _Forward:
    dtype, device = shard.dtype, shard.student.device
    grid = _representable(beta_grid(target), dtype)
    favoured = min(range(len(grid)), key=lambda j: abs(grid[j] * target.geometric_k - 1))
    betas = grid if target.rule != "batch" else [*grid, *_representable([target.given_beta], dtype)]

    sums, mix_argmax = first_pass(shard, betas, fresh=(0, favoured, len(grid)))
    sums[:, [FIRST_PASS.index("student_argmax"), FIRST_PASS.index("teacher_argmax")]] += vocab.start
    token_logits = _token_logits(shard, response_tokens - vocab.start)
    rows = _Rows.merge(_gather(torch.cat([sums, token_logits], dim=1), vocab.group), betas, shard)

    if target.given_beta is None:
        solution = solve_on_grid(
            betas, rows.mix, rows.student.entropy, rows.max_entropy, favoured=favoured, dtype=dtype
        )
    else:
        beta = torch.full_like(rows.student.entropy, betas[-1])
        solution = GridSolution.given(beta, rows.mix.log_sum[:, -1])

    constants = rows.constants(solution.beta, solution.log_sum, dtype)
    forward_kl = divergence.kind == "forward_kl"
    part = _gather(second_pass(shard, constants, mix_argmax, forward_kl=forward_kl), vocab.group)
    final = _Final.polish(solution, rows, part, constants, dtype)

    constants = rows.constants(final.beta, final.log_sum, dtype)
    loss = centre = final.reverse_kl
    if divergence.kind == "forward_kl":
        loss = final.forward_kl
    elif divergence.kind == "jsd":
        loss, centre = (
            _gather(jsd_pass(shard, constants, divergence.jsd_lambda), vocab.group).sum(0).unbind(1)
        )
        loss = loss.clamp(min=0)
    if target.given_beta is None:
        status = token_status(
            rows.student.entropy, final.entropy, final.beta, grid[0], grid[-1], target.lowest_is_bound
        )
    else:
        status = status_given(final.beta)

    student_log_prob, teacher_log_prob, target_log_prob = rows.log_probs(
        response_tokens, final.beta, final.log_sum, vocab.vocab_size
    )
    stats = TokenStats(
        loss=loss,
        reverse_kl=final.reverse_kl,
        student_entropy=rows.student.entropy,
        teacher_entropy=rows.teacher.entropy,
        target_entropy=final.entropy,
        beta=final.beta,
        status=status,
        student_log_prob=student_log_prob,
        teacher_log_prob=teacher_log_prob,
        target_log_prob=target_log_prob,
        top1_agreement=rows.top1_agreement,
        grid_betas=torch.tensor(grid, dtype=dtype, device=device),
        grid_entropies=rows.grid_entropies[:, : len(grid)],
    )
    for field in fields(stats):
        value = getattr(stats, field.name)
        if value.is_floating_point():
            setattr(stats, field.name, value.to(dtype))
    return _Forward(stats, constants, centre.to(dtype))


def _representable(betas: Any, dtype: torch.dtype) -> list[float]:
    """The first beta rounded to what ``dtype`` can hold; the others of a grid are it times powers of 2, and can be held too."""
    return torch.tensor(betas, dtype=torch.float64).to(dtype).tolist()


def _token_logits(shard: Shard, local_tokens: Tensor) -> Tensor:
    """[T, 2] the student's and the teacher's logit of the response token; 0 where another rank holds it."""
    num_valid = shard.student.shape[1]
    if num_valid == 0:
        return shard.student.new_zeros(local_tokens.shape[0], 2, dtype=shard.dtype)
    here = ((local_tokens >= 0) & (local_tokens < num_valid))[:, None]
    column = local_tokens.clamp(0, num_valid - 1)[:, None]
    both = [logits.gather(1, column).to(shard.dtype) for logits in (shard.student, shard.teacher)]
    return torch.where(here, torch.cat(both, dim=1), 0.0)


def _gather(columns: Tensor, group: dist.ProcessGroup | None) -> Tensor:
    """[T, n] of every rank -> [tp_size, T, n] float64, in rank order.

    Sums over ranks are taken locally from this: an all-reduce need not give every rank the same bits.
    """
    if group is None or columns.shape[0] == 0 or dist.get_world_size(group) == 1:
        return columns[None].double()
    gathered = columns.new_empty(dist.get_world_size(group), *columns.shape)
    dist.all_gather_into_tensor(gathered, columns.contiguous(), group=group)
    return gathered.double()


@dataclass(frozen=True)
class _Softmax:
    """One side's distribution over the whole vocabulary: maximum, log of the normaliser relative to it, entropy; [T] float64."""

    maximum: Tensor
    log_sum: Tensor
    entropy: Tensor
    argmax: Tensor

    @classmethod
    def merge(cls, maximum: Tensor, tail: Tensor, first: Tensor, argmax: Tensor) -> _Softmax:
        """From the ranks' maxima, sums and argmaxes, [tp_size, T] each."""
        top = maximum.amax(0)
        shift = (maximum - top).clamp(min=FLOOR)
        weight, total = shift.exp(), 1 + tail
        whole_tail = (weight * total).sum(0) - 1
        log_sum = whole_tail.log1p()
        entropy = log_sum - (weight * (first + shift * total)).sum(0) / (1 + whole_tail)
        lowest = torch.where(maximum == top, argmax, torch.inf).amin(0)
        return cls(top, log_sum, entropy.clamp(min=0), lowest)


@dataclass(frozen=True)
class _Rows:
    """What the first pass says about every row, over the whole vocabulary, in float64.

    mix: [T, J] at every beta; mix_max: max of w z + y, z and y relative to their maxima; shift: [tp_size, T] each rank's maximum of m
    relative to the reference of x; max_entropy: log of the number of columns with m > -inf; one_sided: (columns where only p is
    positive, columns where only q is).
    """

    student: _Softmax
    teacher: _Softmax
    mix: Cumulants
    grid_entropies: Tensor
    mix_max: Tensor
    shift: Tensor
    max_entropy: Tensor
    one_sided: tuple[Tensor, Tensor]
    token_logits: tuple[Tensor, Tensor]
    mix_weights: tuple[float, float]

    @classmethod
    def merge(cls, gathered: Tensor, betas: list[float], shard: Shard) -> _Rows:
        """From [tp_size, T, FIRST_PASS + 4 J + the 2 token logits]."""
        column = dict(zip(FIRST_PASS, gathered.unbind(2), strict=False))
        sides = [
            _Softmax.merge(*(column[f"{side}_{name}"] for name in ("max", "tail", "first", "argmax")))
            for side in ("student", "teacher")
        ]
        student, teacher = sides
        local = [
            torch.where(torch.isneginf(column[name]), 0.0, column[name])
            for name in ("student_max", "teacher_max")
        ]
        local_max = mixed_logits(local[0], local[1], *shard.mix_weights) + column["mix_max"]
        reference = mixed_logits(student.maximum, teacher.maximum, *shard.mix_weights)
        # Rounded to what the passes over the logits can subtract, and taken as the reference from here on.
        mix_max = (local_max.amax(0) - reference).to(shard.dtype).double()
        shift = (local_max - (reference + mix_max)).clamp(min=FLOOR)

        grid = torch.tensor(betas, dtype=torch.float64, device=gathered.device)
        moments = gathered[:, :, len(FIRST_PASS) : -2].unflatten(2, (len(betas), 4)).unbind(3)
        mix = _merge_moments(moments, shift[:, :, None], grid)
        num_student, num_mix, num_both = (
            column[name].sum(0) for name in ("num_student", "num_mix", "num_both")
        )
        return cls(
            student=student,
            teacher=teacher,
            mix=mix,
            grid_entropies=mix.entropy(grid),
            mix_max=mix_max,
            shift=shift,
            max_entropy=num_mix.log(),
            one_sided=(num_student > num_both, num_mix > num_both),
            token_logits=(gathered[:, :, -2].sum(0), gathered[:, :, -1].sum(0)),
            mix_weights=shard.mix_weights,
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
    """The ranks' S0 - 1, S1, S2, S3 of x relative to their own maxima -> the cumulants relative to the common reference."""
    tail, s1, s2, s3 = moments
    s0, weight = 1 + tail, (beta * shift).exp()
    return Cumulants.from_sums(
        (weight * s0).sum(0) - 1,
        (weight * (s1 + shift * s0)).sum(0),
        (weight * (s2 + shift * (2 * s1 + shift * s0))).sum(0),
        (weight * (s3 + shift * (3 * s2 + shift * (3 * s1 + shift * s0)))).sum(0),
    )


@dataclass(frozen=True)
class _Final:
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
        rows: _Rows,
        gathered: Tensor,
        constants: RowConstants,
        dtype: torch.dtype,
    ) -> _Final:
        """From [tp_size, T, SECOND_PASS or SECOND_PASS_FORWARD], taken with ``constants`` at ``solution.beta``."""
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
        tail = tail - 1  # each rank's largest column stands in ``tops``, and the largest of all is 1
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
            y0, y1, y2 = (part[name] * (-log_ratio).exp() for name in ("y0", "y1", "y2"))
            mean = cumulants.mean
            slope = y1 - mean * y0
            bend = y2 - 2 * mean * y1 - y0 * (cumulants.variance + mean**2) + 2 * mean**2 * y0
            forward_kl += cumulants.entropy(beta) - entropy - step * (slope + step * bend / 2)
        only_student, only_target = rows.one_sided
        return cls(
            beta=polished.beta,
            log_sum=polished.log_sum,
            entropy=entropy.clamp(min=0),
            reverse_kl=reverse_kl.clamp(min=0).masked_fill(only_student, torch.inf),
            forward_kl=forward_kl.clamp(min=0).masked_fill(only_target, torch.inf),
        )


class _HandWrittenBackward(torch.autograd.Function):
    """Hands the loss through and, in backward, writes its gradient with respect to the student's logits."""

    @staticmethod
    def forward(
        ctx: Any,
        student_logits: Tensor,
        teacher_logits: Tensor,
        loss: Tensor,
        constants: RowConstants,
        centre: Tensor,
        divergence: Divergence,
        shard: Shard,
        inplace: bool,
    ) -> Tensor:
        ctx.save_for_backward(student_logits, teacher_logits, centre, *constants.tensors())
        ctx.divergence, ctx.inplace = divergence, inplace
        ctx.num_valid, ctx.mix_weights, ctx.dtype = shard.student.shape[1], shard.mix_weights, shard.dtype
        return loss.clone()

    @staticmethod
    def backward(ctx: Any, grad_loss: Tensor) -> tuple[Tensor | None, ...]:  # type: ignore[override]
        student_logits, teacher_logits, centre, *constants = ctx.saved_tensors
        # detach shares the version counter: a second backward through overwritten logits is an error of autograd
        gradient = student_logits.detach() if ctx.inplace else torch.empty_like(student_logits)
        valid = slice(0, ctx.num_valid)
        shard = Shard(student_logits.detach()[:, valid], teacher_logits[:, valid], ctx.mix_weights, ctx.dtype)
        write_gradient(
            shard,
            RowConstants(*constants),
            centre,
            ctx.divergence,
            grad_loss.to(ctx.dtype),
            gradient[:, valid],
        )
        gradient[:, ctx.num_valid :] = 0
        return gradient, *(None,) * 7
