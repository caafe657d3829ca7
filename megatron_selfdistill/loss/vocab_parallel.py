# Copyright (c) 2026 the megatron_selfdistill authors. Apache-2.0.
"""The self-distillation loss with the vocabulary split over a tensor-parallel group.

Forward and backward are written by hand.

Two small all-gathers per call (three for JSD) and none in backward, whatever the number of tokens:

    pass A over the logits -> gather -> solve beta, the same bits on every rank
    pass B over the logits -> gather -> polish beta, divergences          (JSD: one more pass and gather)
    backward: one pass, writes the gradient

Sums are taken in float32 (float64 for float64 logits); merging, solving and polishing run in float64 on
[T, J] numbers.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, fields
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from megatron_selfdistill.loss.divergence import Divergence
from megatron_selfdistill.loss.entropy_match import GridSolution, solve_on_grid
from megatron_selfdistill.loss.row_statistics import Final, Rows
from megatron_selfdistill.loss.row_sums import (
    FIRST_PASS,
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

    start: first global column; size: number of columns here, equal on all ranks of ``group``.
    vocab_size: valid columns of the whole vocabulary; those after them are padding and take part in nothing.
    group: the tensor-parallel group; None for one rank.
    """

    start: int
    size: int
    vocab_size: int
    group: dist.ProcessGroup | None = None

    def __post_init__(self) -> None:
        if self.start < 0 or self.size < 1 or not 1 <= self.vocab_size < 2**24:
            raise ValueError(
                "VocabShard needs start >= 0, size >= 1, 1 <= vocab_size < 2^24 (indices travel as float32); "
                f"got start={self.start}, size={self.size}, vocab_size={self.vocab_size}."
            )

    @property
    def num_valid(self) -> int:
        """Columns of this shard that are not padding: 0 .. size."""
        return min(self.size, max(0, self.vocab_size - self.start))

    @classmethod
    def from_group(cls, padded_vocab_size: int, vocab_size: int, group: dist.ProcessGroup | None) -> VocabShard:
        """The shard of this rank of ``group``, as Megatron splits an output layer: equal, in rank order."""
        tp_size, tp_rank = (1, 0) if group is None else (dist.get_world_size(group), dist.get_rank(group))
        if padded_vocab_size % tp_size or vocab_size > padded_vocab_size:
            raise ValueError(
                f"VocabShard.from_group: padded_vocab_size must be a multiple of the {tp_size} ranks "
                f"and at least vocab_size {vocab_size}; got {padded_vocab_size}."
            )
        size = padded_vocab_size // tp_size
        return cls(tp_rank * size, size, vocab_size, group)


@dataclass
class TokenStats:
    """Everything known about T response tokens, equal on all ranks of the group.

    float32, or float64 for float64 logits.  Entropies, divergences and log-probs are in nats.
    Only ``loss`` carries a gradient, to the student's logits.
    """

    loss: Tensor
    """[T] the divergence."""
    reverse_kl: Tensor
    """[T] KL(p || q) = KL(student || target), whatever the divergence; +inf where q is 0 and p is not."""
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

    @classmethod
    def joined(cls, parts: Sequence[TokenStats]) -> TokenStats:
        """Of all tokens, from those of at least one part after the other under one target."""
        rows = [f.name for f in fields(cls) if f.name != "grid_betas"]
        values = {name: torch.cat([getattr(part, name) for part in parts]) for name in rows}
        return cls(**values, grid_betas=parts[0].grid_betas)


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
    """The divergence between student and mixed target of every response token, over ``vocab.group``.

    Equals ``divergence(log_softmax(s), mixed_target(s, t, target).log_q, divergence)`` on the valid columns
    of all ranks together.

    Shapes: both logits [T, vocab.size], any float dtype; response_tokens [T] int64, global ids.
    Ranks: T and response_tokens are equal on all ranks of the group; so is the result.
    Gradient: to ``student_logits`` only, in their dtype; the target is a constant; 0 at padding columns.
    inplace_backward: backward writes the gradient over the student's logits; nobody may read them afterwards.
    -inf: a column with -inf in the student and in the teacher does not exist.  Where only the teacher has it,
    q = 0, and KL(p || q) is +inf with a gradient that is not finite: mask such columns in the student too, or
    use another divergence.  Where only the student has it, p = q = 0; under teacher_alone KL(q || p) is +inf.
    NaN: a row with NaN or +inf gives NaN in that row only.
    Cost: two all-gathers (JSD three), none in backward, none for T = 0.  Temporaries: a few chunks of rows,
    see ``row_sums.CHUNK_BYTES``.  Kept for backward: both logits and seven numbers per token.
    Raises: ValueError if shapes do not fit.
    """
    _check_logits("distillation_loss", student_logits, teacher_logits, vocab)
    _check_tokens(student_logits, response_tokens)
    dtype = _sum_dtype(student_logits, teacher_logits)
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


def _check_logits(caller: str, student_logits: Tensor, teacher_logits: Tensor, vocab: VocabShard) -> None:
    shape = tuple(student_logits.shape)
    if len(shape) != 2 or shape[1] != vocab.size or tuple(teacher_logits.shape) != shape:
        raise ValueError(
            f"{caller}: both logits must be [T, {vocab.size}], the columns of this VocabShard; "
            f"got student {shape} and teacher {tuple(teacher_logits.shape)}."
        )


def _check_tokens(student_logits: Tensor, response_tokens: Tensor) -> None:
    num_rows = student_logits.shape[0]
    if tuple(response_tokens.shape) != (num_rows,) or response_tokens.dtype != torch.int64:
        raise ValueError(
            f"distillation_loss: response_tokens must be int64 of shape ({num_rows},), one id per row; "
            f"got {response_tokens.dtype} of shape {tuple(response_tokens.shape)}."
        )


def _sum_dtype(student_logits: Tensor, teacher_logits: Tensor) -> torch.dtype:
    return torch.promote_types(torch.promote_types(student_logits.dtype, teacher_logits.dtype), torch.float32)


@dataclass(frozen=True)
class TargetSolution:
    """Of T rows, equal on all ranks of the group, float64: log q = beta m - log_normaliser, with m of ``Target``."""

    beta: Tensor
    """[T] 1 / k; 1 under teacher_alone."""
    log_normaliser: Tensor
    """[T] log of the sum of e^(beta m), to the accuracy of the sums (float32, or float64 for float64 logits)."""


def solve_target(student_logits: Tensor, teacher_logits: Tensor, target: Target, vocab: VocabShard) -> TargetSolution:
    """The beta of every row and the normaliser that goes with it, as `distillation_loss` finds them, bit for bit.

    Shapes, ranks, -inf and NaN as there; there is no response token, no divergence and no gradient.
    Cost: two all-gathers over ``vocab.group``.
    Raises: ValueError if shapes do not fit.
    """
    _check_logits("solve_target", student_logits, teacher_logits, vocab)
    dtype = _sum_dtype(student_logits, teacher_logits)
    with torch.no_grad():
        valid = slice(0, vocab.num_valid)
        shard = Shard(student_logits[:, valid], teacher_logits[:, valid], target.mix_weights, dtype)
        no_token = shard.student.new_zeros(shard.student.shape[0], 2, dtype=dtype)
        solved = _solve(shard, no_token, target, vocab, forward_kl=False)
        rows, beta = solved.rows, solved.final.beta
        highest = mixed_logits(rows.student.maximum, rows.teacher.maximum, *target.mix_weights) + rows.mix_max
        return TargetSolution(beta, beta * highest + solved.final.log_sum)


@dataclass(frozen=True)
class _Solved:
    """The polished solution of all rows, what it came from, and the betas of the grid."""

    rows: Rows
    final: Final
    grid: list[float]


def _solve(shard: Shard, token_logits: Tensor, target: Target, vocab: VocabShard, *, forward_kl: bool) -> _Solved:
    """Two passes and two gathers; ``token_logits [T, 2]`` travel with the first, ``forward_kl`` with the second."""
    dtype = shard.dtype
    grid = _representable(beta_grid(target), dtype)
    favoured = min(range(len(grid)), key=lambda j: abs(grid[j] * target.geometric_k - 1))
    betas = grid if target.rule != "batch" else [*grid, *_representable([target.given_beta], dtype)]

    doubled = [j for j in range(1, len(betas)) if j != favoured and betas[j] == 2 * betas[j - 1]]
    sums, mix_argmax = first_pass(shard, betas, doubled)
    sums[:, [FIRST_PASS.index("student_argmax"), FIRST_PASS.index("teacher_argmax")]] += vocab.start
    rows = Rows.merge(_gather(torch.cat([sums, token_logits], dim=1), vocab.group), betas, shard)

    if target.given_beta is None:
        solution = solve_on_grid(
            betas, rows.mix, rows.student.entropy, rows.max_entropy, favoured=favoured, dtype=dtype
        )
    else:
        beta = torch.full_like(rows.student.entropy, betas[-1])
        solution = GridSolution.given(beta, rows.mix.log_sum[:, -1])

    constants = rows.constants(solution.beta, solution.log_sum, dtype)
    part = _gather(second_pass(shard, constants, mix_argmax, forward_kl=forward_kl), vocab.group)
    return _Solved(rows, Final.polish(solution, rows, part, constants, dtype), grid)


@dataclass(frozen=True)
class _Forward:
    """stats: all of TokenStats; constants and centre: what backward needs, [T] each."""

    stats: TokenStats
    constants: RowConstants
    centre: Tensor


def _forward(
    shard: Shard, response_tokens: Tensor, target: Target, divergence: Divergence, vocab: VocabShard
) -> _Forward:
    dtype, device = shard.dtype, shard.student.device
    token_logits = _token_logits(shard, response_tokens - vocab.start)
    solved = _solve(shard, token_logits, target, vocab, forward_kl=divergence.kind == "forward_kl")
    rows, final, grid = solved.rows, solved.final, solved.grid

    constants = rows.constants(final.beta, final.log_sum, dtype)
    loss = centre = final.reverse_kl
    if divergence.kind == "forward_kl":
        loss = final.forward_kl
    elif divergence.kind == "jsd":
        loss, centre = _gather(jsd_pass(shard, constants, divergence.jsd_lambda), vocab.group).sum(0).unbind(1)
        loss = loss.clamp(min=0)
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
        status=_status(target, rows, final, grid),
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


def _status(target: Target, rows: Rows, final: Final, grid: list[float]) -> Tensor:
    if target.given_beta is not None:
        return status_given(final.beta)
    ends = grid[0], grid[-1]
    return token_status(rows.student.entropy, final.entropy, final.beta, *ends, target.lowest_is_bound)


def _representable(betas: Any, dtype: torch.dtype) -> list[float]:
    """Rounded to what ``dtype`` can hold; powers of 2 between the betas of a grid stay exact."""
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
    dist.all_gather(list(gathered.unbind(0)), columns.contiguous(), group=group)
    return gathered.double()


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
        # detach shares the version counter: autograd refuses a second backward through overwritten logits
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
