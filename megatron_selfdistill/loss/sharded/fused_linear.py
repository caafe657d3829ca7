# Copyright (c) 2026 the megatron_selfdistill authors. Apache-2.0.
"""The output layer fused with the loss: from hidden states to divergences without the logits of all tokens at once.

Student and teacher are projected chunk of tokens by chunk of tokens, and the passes of vocab_parallel.py run on each
chunk.  The mode determines the tensors that are kept for backward:

    keep_gradient   the gradient of the student's logits for a loss of 1 per token, one tensor [R, V / tp]: backward
                    is one dgrad and one wgrad GEMM, and the incoming gradient multiplies tensors of width h
    low_memory      a few numbers per token: backward projects each chunk again, without the loss's collectives, and
                    both GEMMs run per chunk

A kept gradient can only be scaled, so only low_memory has a gradient of the log-probs of the response tokens.
keep_gradient takes 4 GEMMs of R x h x V / tp, and low_memory takes 6; a reference that is projected apart from the
teacher takes one more per projection of the teacher.  With chunks of c tokens, the logits of R + c or
of 2 c tokens exist at a time; without fusion, the logits of 2 R tokens.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from megatron_selfdistill.choices import FUSED_MODES
from megatron_selfdistill.loss.divergence import Divergence, TokenDivergences, token_groups
from megatron_selfdistill.loss.sharded.argument_checks import check_reference
from megatron_selfdistill.loss.sharded.backend import Backend, chosen
from megatron_selfdistill.loss.sharded.gathered_hidden import HiddenPlacement, gather_width
from megatron_selfdistill.loss.sharded.projection_gradients import ProjectionGradients, WeightGradient
from megatron_selfdistill.loss.sharded.shard_sums import LogProbGradient, Shard, TokenConstants
from megatron_selfdistill.loss.sharded.vocab_parallel import (
    ForwardResult,
    Observer,
    TokenStats,
    VocabShard,
    make_shard,
    run_forward,
)
from megatron_selfdistill.loss.target import Target


def fused_distillation_loss(
    student_hidden: Tensor,
    teacher_hidden: Tensor,
    student_weight: Tensor,
    teacher_weight: Tensor | None,
    response_tokens: Tensor,
    *,
    target: Target,
    divergence: TokenDivergences,
    vocab: VocabShard,
    reference_entropy: Tensor | None = None,
    reference: tuple[Tensor, Tensor] | None = None,
    teacher_weights: Tensor | None = None,
    chunk_tokens: int = 4096,
    mode: str = "keep_gradient",
    gather_indices: Tensor | None = None,
    weight_gradient: WeightGradient | None = None,
    observe: Observer | None = None,
    backend: str | None = None,
) -> TokenStats:
    """Return ``distillation_loss(hidden_s @ student_weight^T, hidden_t @ teacher_weight^T, ...)`` of R response tokens.

    Shapes: weights [V / tp, h], this rank's rows; teacher_weight None: the student's weight.  Hidden states and weights
    have one dtype, which is also the dtype of the logits.  response_tokens [R] int64, global ids.
    student_hidden: [R, h], equal on all ranks of ``vocab.group``.  With gather_indices [R] int64 it is [n, h], the
    rank's own rows, see `HiddenPlacement`.  Then only the rank's own rows are kept, and gathered once more in backward.
    teacher_hidden: [R, h], equal on all ranks; or [R, h / tp], cut by width in rank order.
    Reference: with ``target.is_anchored`` teacher_hidden are the states of the mix, (w h_t + h_r) / (1 + w), of one
    output weight that teacher and reference share.  Where the weights differ, teacher_hidden are the teacher's own
    states, ``reference`` holds the reference's hidden states and weight, in the teacher's shapes, and the logits
    (w t + r) / (1 + w) are the sum of two projections.
    reference_entropy [R], teacher_weights [R] and groups of ``divergence``: as for `distillation_loss`; a chunk has
    tokens of one group.
    chunk_tokens, mode: see the module; the result depends on them by rounding only.
    Gradient: to student_hidden (summed over the ranks; with gather_indices the gradient of the rank's own rows, 0 for
    rows without a token) and to student_weight.  The incoming gradient may differ between tokens.  In low_memory
    ``student_log_prob`` is differentiable beside ``loss``, as in `distillation_loss`.  In keep_gradient it is not: a
    backward that reaches it raises ValueError.
    weight_gradient: receives the weight's gradient, within backward only.  Without it, autograd gets the gradient in
    the weight's dtype, summed over chunks in float32, which takes a float32 copy of the weight's shape in low_memory.
    observe: reads the logits of each chunk in the forward pass, in the order of the tokens.
    Statistics, ranks, backend, -inf and NaN: as `distillation_loss`.
    Collectives: per chunk the all-gathers of `distillation_loss` (three, JSD four, one less for a given beta), and one
    each of the teacher's and the reference's hidden states where these are cut.  With gather_indices one all-gather in
    forward and another in backward.  In backward one all-reduce of dgrad, or one reduce-scatter with gather_indices,
    while the last wgrad GEMM runs; low_memory gathers the hidden states of teacher and reference again.
    Raises: ValueError if shapes or dtypes do not fit.
    """
    placement = HiddenPlacement(vocab.group, gather_indices)
    layer = _Layer(
        target,
        token_groups(divergence, len(response_tokens)),
        teacher_weights,
        vocab,
        chosen(backend, student_hidden, teacher_hidden),
        chunk_tokens,
        response_tokens.shape[0],
        placement,
        weight_gradient,
    )
    others = _Others(teacher_hidden, teacher_weight, *(reference or (None, None)))
    _check(layer, mode, student_hidden, student_weight, others, response_tokens)
    check_reference(target, len(response_tokens), reference_entropy, teacher_weights)
    trained = torch.is_grad_enabled() and (student_hidden.requires_grad or student_weight.requires_grad)
    keep = trained and mode == "keep_gradient"
    with torch.no_grad():
        all_hidden = placement.start_gather(student_hidden)()
        logits = _Logits(layer, all_hidden, student_weight, others, keep)
        forward = _forward_chunks(layer, logits, response_tokens, reference_entropy, observe)
    stats = forward.stats
    if not trained:
        return stats
    kept: tuple[Any, ...] = (logits.kept, None, None, None)
    if not keep:
        kept = (None, forward.constants, forward.kl_value, response_tokens, *others)
    values = stats.loss, stats.student_log_prob
    loss, log_prob = _Backward.apply(student_hidden, student_weight, *values, layer, *kept)  # type: ignore[no-untyped-call]
    return replace(stats, loss=loss, student_log_prob=log_prob)


@dataclass(frozen=True)
class _Layer:
    """The values that forward and backward of one call share, besides the tensors that autograd watches."""

    target: Target
    groups: list[tuple[slice, Divergence]]
    teacher_weights: Tensor | None
    vocab: VocabShard
    backend: Backend
    chunk_tokens: int
    num_tokens: int
    placement: HiddenPlacement
    weight_gradient: WeightGradient | None

    def chunks(self) -> Iterator[tuple[slice, Divergence]]:
        """Yield the slices of tokens of the chunks with their divergence; one empty slice where there are no tokens."""
        for group, divergence in self.groups:
            for start in range(group.start, max(group.stop, 1), self.chunk_tokens):
                yield slice(start, min(start + self.chunk_tokens, group.stop)), divergence

    def shard(self, student_logits: Tensor, teacher_logits: Tensor) -> Shard:
        """Return the shard of a chunk's logits, see `make_shard`."""
        return make_shard(student_logits, teacher_logits, self.target, self.vocab)

    def gradients(
        self, student_hidden: Callable[[], Tensor] | None, hidden: Tensor, weight: Tensor, needs_hidden: bool
    ) -> ProjectionGradients:
        """Return the gradients of one backward, which are still to be added, see `ProjectionGradients`."""
        return ProjectionGradients(
            self.num_tokens, self.placement, self.weight_gradient, student_hidden, hidden, weight, needs_hidden
        )

    def write_gradient(
        self,
        shard: Shard,
        constants: TokenConstants,
        kl_value: Tensor,
        divergence: Divergence,
        grad_loss: Tensor,
        out: Tensor,
        log_prob: LogProbGradient | None = None,
    ) -> None:
        """Write the gradient of the student's logits into ``out`` [n, V / tp], see `Backend`; 0 at padding.

        ``out`` may be the student's logits.
        """
        valid = out[:, : self.vocab.num_valid]
        self.backend.write_gradient(shard, constants, kl_value, divergence, grad_loss, valid, log_prob)
        out[:, self.vocab.num_valid :] = 0


class _Others(NamedTuple):
    """The hidden states and output weights of the models that do not learn; a weight of None is the student's."""

    teacher_hidden: Tensor
    teacher_weight: Tensor | None
    reference_hidden: Tensor | None
    reference_weight: Tensor | None


class _Logits:
    """The logits of student and teacher, one chunk after the other in the same memory.

    With a reference of its own, the teacher's logits t become those of the mix, (w t + r) / (1 + w).

    kept: [R, V / tp] or None.  The student's logits of a chunk lie in the chunk's rows of ``kept``, where their
    gradient overwrites them.  The teacher's logits lie behind them, where the next chunk will be written, as long as
    there is room.
    """

    def __init__(
        self,
        layer: _Layer,
        all_hidden: Tensor,
        student_weight: Tensor,
        others: _Others,
        keep: bool,
    ) -> None:
        self.layer, self.all_hidden, self.student_weight, self.others = layer, all_hidden, student_weight, others
        longest, columns = min(layer.chunk_tokens, layer.num_tokens), student_weight.shape[0]
        self.kept = all_hidden.new_empty(layer.num_tokens, columns) if keep else None
        self.block = all_hidden.new_empty(longest if keep else 2 * longest, columns)

    def of(self, tokens: slice) -> tuple[Tensor, Tensor]:
        """Return the logits (student's, teacher's) [n, V / tp] of a chunk, valid until the next call."""
        student, others = self.all_hidden[tokens], self.others
        count = len(student)
        both = self.block if self.kept is None else self.kept[tokens.start :]
        if len(both) >= 2 * count:
            both = both[: 2 * count]
            student_logits, teacher_logits = both[:count], both[count:]
        else:
            assert self.kept is not None
            student_logits, teacher_logits = self.kept[tokens], self.block[:count]
        torch.mm(student, self.student_weight.t(), out=student_logits)
        weight = self.student_weight if others.teacher_weight is None else others.teacher_weight
        teacher = self._full_width(others.teacher_hidden[tokens])
        if others.reference_hidden is None or others.reference_weight is None:
            torch.mm(teacher, weight.t(), out=teacher_logits)
            return student_logits, teacher_logits
        reference, weights = self._full_width(others.reference_hidden[tokens]), self.layer.teacher_weights
        beta, alpha = 1 - 1 / self.layer.target.geometric_k, 1 / self.layer.target.geometric_k
        if weights is not None:  # a GEMM has one beta and one alpha, so each token's states are scaled
            share = 1 / (1 + weights[tokens, None].float())
            teacher, reference = ((1 - share) * teacher).to(teacher.dtype), (share * reference).to(reference.dtype)
            beta = alpha = 1.0
        torch.mm(teacher, weight.t(), out=teacher_logits)
        # The product and the sum are float32 inside of the GEMM, and the sum is rounded once.
        teacher_logits.addmm_(reference, others.reference_weight.t(), beta=beta, alpha=alpha)
        return student_logits, teacher_logits

    def _full_width(self, part: Tensor) -> Tensor:
        """Return the hidden states [n, h] of a chunk, gathered over the ranks where ``part`` is cut by width."""
        if part.shape[1] == self.student_weight.shape[1]:
            return part
        return gather_width(part, self.layer.vocab.group)


def _forward_chunks(
    layer: _Layer,
    logits: _Logits,
    response_tokens: Tensor,
    reference_entropy: Tensor | None,
    observe: Observer | None,
) -> ForwardResult:
    """Return the statistics of all tokens, and what backward needs besides the logits.

    Where the gradient is kept, it is written into ``logits.kept``.
    """
    parts = []
    for tokens, divergence in layer.chunks():
        student_logits, teacher_logits = logits.of(tokens)
        shard = layer.shard(student_logits, teacher_logits)
        forward = run_forward(
            shard,
            tokens,
            response_tokens,
            layer.target,
            divergence,
            layer.vocab,
            layer.backend,
            reference_entropy=reference_entropy,
            teacher_weights=layer.teacher_weights,
        )
        if observe is not None:
            observe(tokens, student_logits, teacher_logits, forward.stats)
        if logits.kept is not None:
            unit = torch.ones_like(forward.kl_value)
            layer.write_gradient(shard, forward.constants, forward.kl_value, divergence, unit, logits.kept[tokens])
        parts.append(forward)
    return ForwardResult.concatenate(parts)


_NO_LOG_PROB = (
    "fused_distillation_loss: mode keep_gradient holds the gradient of the divergence alone, and student_log_prob is "
    "used beside it; set mode (loss.fused) to low_memory, or materialise the logits."
)


class _Backward(torch.autograd.Function):
    """The autograd function that returns the loss and log p, and computes the gradients of states and weight."""

    @staticmethod
    def forward(
        ctx: Any,
        student_hidden: Tensor,
        student_weight: Tensor,
        loss: Tensor,
        log_prob: Tensor,
        layer: _Layer,
        gradient: Tensor | None,
        constants: TokenConstants | None,
        kl_value: Tensor | None,
        response_tokens: Tensor | None,
        *others: Tensor | None,
    ) -> tuple[Tensor, Tensor]:
        per_token = constants.tensors() if constants is not None else ()
        ctx.save_for_backward(student_hidden, student_weight, gradient, kl_value, response_tokens, *others, *per_token)
        ctx.set_materialize_grads(False)  # an output that nobody uses has no gradient, not a gradient of zeros
        ctx.layer, ctx.num_others = layer, len(others)
        return loss.clone(), log_prob.clone()

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_loss: Tensor | None, grad_log_prob: Tensor | None) -> tuple[Tensor | None, ...]:
        layer, no_gradient = ctx.layer, (None,) * (7 + ctx.num_others)
        hidden, weight, kept, kl_value, response_tokens, *rest = ctx.saved_tensors
        if grad_loss is None:
            grad_loss = hidden.new_zeros(layer.num_tokens, dtype=torch.promote_types(hidden.dtype, torch.float32))
        others, constants = rest[: ctx.num_others], rest[ctx.num_others :]
        needs_hidden, needs_weight = ctx.needs_input_grad[:2]
        if kept is not None:
            if grad_log_prob is not None:
                raise ValueError(_NO_LOG_PROB)
            wait = layer.placement.start_gather(hidden) if needs_weight else None
            grads = layer.gradients(wait, hidden, weight, needs_hidden)
            grads.add(slice(0, layer.num_tokens), kept, scale=grad_loss[:, None], last=True)
            return grads.of_hidden(), grads.of_weight(), *no_gradient
        all_hidden = layer.placement.start_gather(hidden)()
        grads = layer.gradients((lambda: all_hidden) if needs_weight else None, hidden, weight, needs_hidden)
        logits = _Logits(layer, all_hidden, weight, _Others(*others), keep=False)
        log_prob = LogProbGradient.of(grad_log_prob, response_tokens, layer.vocab.start, layer.vocab.vocab_size)
        for tokens, divergence in layer.chunks():
            student_logits, teacher_logits = logits.of(tokens)
            shard = layer.shard(student_logits, teacher_logits)
            chunk, scale = TokenConstants(*(values[tokens] for values in constants)), grad_loss[tokens].to(shard.dtype)
            of_log_prob = None if log_prob is None else log_prob.of_tokens(tokens)
            layer.write_gradient(shard, chunk, kl_value[tokens], divergence, scale, student_logits, of_log_prob)
            grads.add(tokens, student_logits, scale=None, last=tokens.stop == layer.num_tokens)
        return grads.of_hidden(), grads.of_weight(), *no_gradient


def _check(
    layer: _Layer, mode: str, student_hidden: Tensor, student_weight: Tensor, others: _Others, response_tokens: Tensor
) -> None:
    """Check the arguments of `fused_distillation_loss`; raise ValueError if they do not fit."""
    name, size, width = "fused_distillation_loss", layer.vocab.size, student_weight.shape[-1]
    num_tokens, gather_indices = layer.num_tokens, layer.placement.gather_indices
    if mode not in FUSED_MODES or layer.chunk_tokens < 1:
        raise ValueError(
            f"{name}: mode must be one of {', '.join(FUSED_MODES)} and chunk_tokens at least 1; "
            f"got {mode!r} and {layer.chunk_tokens}."
        )
    if others.reference_hidden is not None and not layer.target.is_anchored:
        raise ValueError(f"{name}: reference must be None without anchor=reference; got {layer.target}.")
    for weight in (student_weight, others.teacher_weight, others.reference_weight):
        if weight is not None and tuple(weight.shape) != (size, width):
            raise ValueError(
                f"{name}: weights must be [{size}, {width}], the columns of this VocabShard; got {tuple(weight.shape)}."
            )
    held, cut = student_hidden.shape[0] if gather_indices is not None else num_tokens, width // layer.placement.size
    for what, hidden in (("teacher_hidden", others.teacher_hidden), ("the reference's", others.reference_hidden)):
        shapes = tuple(student_hidden.shape), tuple(hidden.shape) if hidden is not None else (num_tokens, cut)
        if shapes[0] != (held, width) or shapes[1] not in ((num_tokens, width), (num_tokens, cut)):
            raise ValueError(
                f"{name}: student_hidden must be [{held}, {width}] and {what} [{num_tokens}, {width}] or "
                f"[{num_tokens}, {cut}]; got {shapes[0]} and {shapes[1]}."
            )
    for what, index in (("response_tokens", response_tokens), ("gather_indices", gather_indices)):
        if index is not None and (tuple(index.shape) != (num_tokens,) or index.dtype != torch.int64):
            raise ValueError(
                f"{name}: {what} must be int64 of shape ({num_tokens},), one per token; "
                f"got {index.dtype} of shape {tuple(index.shape)}."
            )
    dtypes = {x.dtype for x in (student_hidden, student_weight, *others) if x is not None}
    if len(dtypes) > 1:
        raise ValueError(f"{name}: hidden states and weights must have one dtype; got {sorted(map(str, dtypes))}.")
