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
teacher, and every control, takes one more per projection of the teacher.  With chunks of c tokens, the logits of R + c
or of 2 c tokens exist at a time, and with controls those of c more; without fusion, the logits of 2 R tokens.

`HiddenPlacement` gathers the hidden states of tokens over the tensor-parallel group for a GEMM, and sums their
gradients.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from typing import Any, NamedTuple, Protocol

import torch
import torch.distributed as dist
from torch import Tensor
from torch.autograd.function import once_differentiable

from megatron_selfdistill.loss.sharded.anchor_share import share_anchor
from megatron_selfdistill.loss.sharded.group_collectives import all_gather, group_size, reduce_scatter
from megatron_selfdistill.loss.sharded.shard_sums import LogProbGradient, Shard, TokenConstants
from megatron_selfdistill.loss.sharded.subtracted_controls import subtract_controls
from megatron_selfdistill.loss.sharded.vocab_parallel import (
    Backend,
    ForwardResult,
    Observer,
    TokenStats,
    VocabShard,
    check_reference,
    chosen,
    make_shard,
    run_forward,
)
from megatron_selfdistill.loss.target import Divergence, Target, check_arguments, check_controls

_NO_LOG_PROB = (
    "fused_distillation_loss: mode keep_gradient holds the gradient of the divergence alone, and student_log_prob is "
    "used beside it; set mode (loss.fused) to low_memory, or materialise the logits."
)


def fused_distillation_loss(
    student_hidden: Tensor,
    teacher_hidden: Tensor,
    student_weight: Tensor,
    teacher_weight: Tensor | None,
    response_tokens: Tensor,
    *,
    target: Target,
    divergence: Divergence,
    vocab: VocabShard,
    reference_entropy: Tensor | None = None,
    reference: tuple[Tensor, Tensor] | None = None,
    control_hidden: Tensor | None = None,
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
    have one dtype, which is also the dtype of the logits.  response_tokens [R] int64, global ids.  A teacher's weight
    and states may have another width than the student's h: the product of n teachers is one of width n h.
    student_hidden: [R, h], equal on all ranks of ``vocab.group``.  With gather_indices [R] int64 it is [n, h], the
    rank's own rows, see `HiddenPlacement`.  Then only the rank's own rows are kept, and gathered once more in backward.
    teacher_hidden: [R, h], equal on all ranks; or [R, h / tp], cut by width in rank order.
    Reference: with ``target.is_anchored`` teacher_hidden are the states of the mix, (w h_t + h_r) / (1 + w), of one
    output weight that teacher and reference share.  Where the weights differ, teacher_hidden are the teacher's own
    states, ``reference`` holds the reference's hidden states and weight, in the teacher's shapes, and the logits
    (w t + r) / (1 + w) are the sum of two projections.
    With a share of a reference the latter always comes in ``reference``, and the layer computes the entropy of the
    anchor itself: one more all-gather per chunk, and float32 logits of a chunk.
    Controls: with ``target.num_controls`` = K, control_hidden [K, R, ..] are the controls' hidden states in the shape
    of the teacher's, for the teacher's weight; the teacher's own states come in teacher_hidden, and a reference, which
    is projected apart even if it shares the weight, in ``reference``.
    reference_entropy [R], teacher_weights [R]: as for `distillation_loss`.
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
    each of the teacher's and the reference's hidden states where these are cut.  Controls take one gather of their
    normalisers, and one of their states where these are cut, per chunk_tokens / K tokens.  With gather_indices one
    all-gather in forward and another in backward.  In backward one all-reduce of dgrad, or one reduce-scatter with
    gather_indices, while the last wgrad GEMM runs; low_memory gathers the hidden states of the models that do not learn
    again.
    Raises: ValueError if shapes or dtypes do not fit.
    """
    reference_hidden, reference_weight = (None, None) if reference is None else reference
    wide = {"teacher_hidden": "T t", "teacher_weight": "V w", "reference_hidden": "T r", "control_hidden": "K T t"}
    rows = {} if gather_indices is None else {"student_hidden": "n h"}
    check_arguments("fused_distillation_loss", locals(), **wide, **rows)
    check_reference("fused_distillation_loss", target, reference_entropy, teacher_weights, reads_reference=True)
    check_controls("fused_distillation_loss", "control_hidden", control_hidden, target)
    if (reference is None and target.reference_share) or (reference is not None and not target.has_reference):
        raise ValueError(
            f"fused_distillation_loss: reference must be given for target.reference_share > 0, and None where the "
            f"anchor has none; got {'none' if reference is None else 'one'} with {target}."
        )
    placement = HiddenPlacement(vocab.group, gather_indices)
    layer = _Layer(
        target,
        divergence,
        teacher_weights,
        vocab,
        chosen(backend, student_hidden, teacher_hidden),
        chunk_tokens,
        response_tokens.shape[0],
        placement,
        weight_gradient,
    )
    num_controls = target.num_controls
    normalisers = (
        student_hidden.new_empty(num_controls, layer.num_tokens, dtype=torch.float32) if num_controls else None
    )
    others = _Others(teacher_hidden, teacher_weight, reference_hidden, reference_weight, control_hidden, normalisers)
    trained = torch.is_grad_enabled() and (student_hidden.requires_grad or student_weight.requires_grad)
    keep = trained and mode == "keep_gradient"
    if target.reference_share and target.needs_reference_entropy:  # written chunk by chunk, as the normalisers are
        reference_entropy = student_hidden.new_empty(layer.num_tokens, dtype=torch.float64)
    with torch.no_grad():
        all_hidden = placement.start_gather(student_hidden)()
        logits = _Logits(layer, all_hidden, student_weight, others, keep, is_forward=True, entropy=reference_entropy)
        forward = _forward_chunks(layer, logits, response_tokens, reference_entropy, observe)
    stats = forward.stats
    if not trained:
        return stats
    kept: tuple[Any, ...] = (logits.kept, None, None, None, None)
    if not keep:
        kept = (None, forward.constants, forward.kl_value, forward.forward_shares, response_tokens, *others)
    values = stats.loss, stats.student_log_prob
    loss, log_prob = _Backward.apply(student_hidden, student_weight, *values, layer, *kept)  # type: ignore[no-untyped-call]
    return replace(stats, loss=loss, student_log_prob=log_prob)


@dataclass(frozen=True)
class _Layer:
    """The values that forward and backward of one call share, besides the tensors that autograd watches."""

    target: Target
    divergence: Divergence
    teacher_weights: Tensor | None
    vocab: VocabShard
    backend: Backend
    chunk_tokens: int
    num_tokens: int
    placement: HiddenPlacement
    weight_gradient: WeightGradient | None

    def chunks(self) -> Iterator[slice]:
        """Yield the slices of tokens of the chunks; one empty slice if there are no tokens."""
        for start in range(0, max(self.num_tokens, 1), self.chunk_tokens):
            yield slice(start, min(start + self.chunk_tokens, self.num_tokens))

    def write_gradient(
        self,
        shard: Shard,
        constants: TokenConstants,
        kl_value: Tensor,
        grad_loss: Tensor,
        out: Tensor,
        log_prob: LogProbGradient | None = None,
        forward_shares: Tensor | None = None,
    ) -> None:
        """Write the gradient of the student's logits into ``out`` [n, V / tp], see `Backend`; 0 at padding.

        ``out`` may be the student's logits.
        """
        options = grad_loss, out[:, : self.vocab.num_valid], log_prob, forward_shares
        self.backend.write_gradient(shard, constants, kl_value, self.divergence, *options)
        out[:, self.vocab.num_valid :] = 0


class _Others(NamedTuple):
    """The hidden states and output weights of the models that do not learn; a weight of None is the student's."""

    teacher_hidden: Tensor
    teacher_weight: Tensor | None
    reference_hidden: Tensor | None
    reference_weight: Tensor | None
    control_hidden: Tensor | None
    normalisers: Tensor | None
    """The normalisers [K, R] of `subtract_controls`, which the forward pass writes."""


class _Logits:
    """The logits of student and teacher, one chunk after the other in the same memory.

    With a reference of its own, the teacher's logits t become those of the mix, (w t + r) / (1 + w).  With controls t
    becomes t - c first, and the mix is w (t - c) + r.

    entropy: the reference's [R], or where it has a share of the anchor the place that gets the anchor's; None in
    backward.
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
        *,
        is_forward: bool = False,
        entropy: Tensor | None = None,
    ) -> None:
        self.layer, self.all_hidden, self.student_weight, self.others = layer, all_hidden, student_weight, others
        self.is_forward, self.entropy = is_forward, entropy
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
        teacher = self._full_width(others.teacher_hidden[tokens], weight)
        target = self.layer.target
        if others.control_hidden is not None or others.reference_weight is None or target.reference_share:
            torch.mm(teacher, weight.t(), out=teacher_logits)
        if others.control_hidden is not None:
            self._contrast(tokens, teacher_logits, weight)
        if others.reference_hidden is None or others.reference_weight is None:
            return student_logits, teacher_logits
        reference = self._full_width(others.reference_hidden[tokens], others.reference_weight)
        if target.reference_share:
            of_reference = reference @ others.reference_weight.t()
            entropy = share_anchor(
                student_logits,
                teacher_logits,
                lambda rows: of_reference[rows],
                target,
                self.layer.vocab,
                backend=self.layer.backend.name,
                chunk_tokens=max(1, count),
                wants_entropy=self.entropy is not None,
            )
            if self.entropy is not None and entropy is not None:
                self.entropy[tokens] = entropy
            return student_logits, teacher_logits
        if others.control_hidden is not None:
            teacher_logits.mul_(target.teacher_weight).addmm_(reference, others.reference_weight.t())
            return student_logits, teacher_logits
        weights = self.layer.teacher_weights
        beta, alpha = 1 - 1 / target.geometric_k, 1 / target.geometric_k
        if weights is not None:  # a GEMM has one beta and one alpha, so each token's states are scaled
            share = 1 / (1 + weights[tokens, None].float())
            teacher, reference = ((1 - share) * teacher).to(teacher.dtype), (share * reference).to(reference.dtype)
            beta = alpha = 1.0
        torch.mm(teacher, weight.t(), out=teacher_logits)
        # The product and the sum are float32 inside of the GEMM, and the sum is rounded once.
        teacher_logits.addmm_(reference, others.reference_weight.t(), beta=beta, alpha=alpha)
        return student_logits, teacher_logits

    def _contrast(self, tokens: slice, teacher_logits: Tensor, weight: Tensor) -> None:
        """Replace the teacher's logits t of a chunk by t - c."""
        others, vocab = self.others, self.layer.vocab
        assert others.control_hidden is not None and others.normalisers is not None
        hidden = others.control_hidden[:, tokens]

        def control_logits(rows: slice) -> Tensor:
            part = hidden[:, rows]
            return (self._full_width(part.flatten(0, 1), weight) @ weight.t()).view(*part.shape[:2], -1)

        subtract_controls(
            teacher_logits,
            control_logits,
            others.normalisers[:, tokens],
            vocab=vocab,
            backend=self.layer.backend,
            chunk_tokens=self.layer.chunk_tokens,
            known=not self.is_forward,
        )

    def _full_width(self, part: Tensor, weight: Tensor) -> Tensor:
        """Return the hidden states [n, h] of a chunk, gathered over the ranks where ``part`` is cut by width."""
        return part if part.shape[1] == weight.shape[1] else gather_width(part, self.layer.vocab.group)


def _forward_chunks(
    layer: _Layer, logits: _Logits, response_tokens: Tensor, reference_entropy: Tensor | None, observe: Observer | None
) -> ForwardResult:
    """Return the statistics of all tokens, and what backward needs besides the logits.

    Where the gradient is kept, it is written into ``logits.kept``.
    """
    parts = []
    for tokens in layer.chunks():
        student_logits, teacher_logits = logits.of(tokens)
        shard = make_shard(student_logits, teacher_logits, layer.target, layer.vocab)
        forward = run_forward(
            shard,
            response_tokens[tokens],
            layer.target,
            layer.divergence,
            layer.vocab,
            layer.backend,
            reference_entropy=None if reference_entropy is None else reference_entropy[tokens],
            teacher_weights=None if layer.teacher_weights is None else layer.teacher_weights[tokens],
        )
        if observe is not None:
            observe(tokens, student_logits, teacher_logits, forward.stats)
        if logits.kept is not None:
            options = torch.ones_like(forward.kl_value), logits.kept[tokens], None, forward.forward_shares
            layer.write_gradient(shard, forward.constants, forward.kl_value, *options)
        parts.append(forward)
    if len(parts) == 1:
        return parts[0]
    shares = [part.forward_shares for part in parts if part.forward_shares is not None]
    return ForwardResult(
        TokenStats.concatenate([part.stats for part in parts]),
        TokenConstants(*map(torch.cat, zip(*(part.constants.tensors() for part in parts), strict=True))),
        torch.cat([part.kl_value for part in parts]),
        torch.cat(shares) if shares else None,
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
        shares: Tensor | None,
        response_tokens: Tensor | None,
        *others: Tensor | None,
    ) -> tuple[Tensor, Tensor]:
        per_token = constants.tensors() if constants is not None else ()
        given = gradient, kl_value, shares, response_tokens, *others, *per_token
        ctx.save_for_backward(student_hidden, student_weight, *given)
        ctx.set_materialize_grads(False)  # an output that nobody uses has no gradient, not a gradient of zeros
        ctx.layer, ctx.num_others = layer, len(others)
        return loss.clone(), log_prob.clone()

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_loss: Tensor | None, grad_log_prob: Tensor | None) -> tuple[Tensor | None, ...]:
        layer, no_gradient = ctx.layer, (None,) * (8 + ctx.num_others)
        hidden, weight, kept, kl_value, shares, response_tokens, *rest = ctx.saved_tensors
        if grad_loss is None:
            grad_loss = hidden.new_zeros(layer.num_tokens, dtype=torch.promote_types(hidden.dtype, torch.float32))
        others, constants = rest[: ctx.num_others], rest[ctx.num_others :]
        needs_hidden, needs_weight = ctx.needs_input_grad[:2]
        if kept is not None:
            if grad_log_prob is not None:
                raise ValueError(_NO_LOG_PROB)
            wait = layer.placement.start_gather(hidden) if needs_weight else None
            grads = ProjectionGradients(layer, wait, hidden, weight, needs_hidden)
            grads.add(slice(0, layer.num_tokens), kept, scale=grad_loss[:, None], last=True)
            return grads.of_hidden(), grads.of_weight(), *no_gradient
        all_hidden = layer.placement.start_gather(hidden)()
        read = (lambda: all_hidden) if needs_weight else None
        grads = ProjectionGradients(layer, read, hidden, weight, needs_hidden)
        logits = _Logits(layer, all_hidden, weight, _Others(*others), keep=False)
        log_prob = LogProbGradient.of(grad_log_prob, response_tokens, layer.vocab.start, layer.vocab.vocab_size)
        for tokens in layer.chunks():
            student_logits, teacher_logits = logits.of(tokens)
            shard = make_shard(student_logits, teacher_logits, layer.target, layer.vocab)
            chunk, scale = TokenConstants(*(values[tokens] for values in constants)), grad_loss[tokens].to(shard.dtype)
            of_log_prob = None if log_prob is None else log_prob.of_tokens(tokens)
            options = scale, student_logits, of_log_prob, None if shares is None else shares[tokens]
            layer.write_gradient(shard, chunk, kl_value[tokens], *options)
            grads.add(tokens, student_logits, scale=None, last=tokens.stop == layer.num_tokens)
        return grads.of_hidden(), grads.of_weight(), *no_gradient


class WeightGradient(Protocol):
    """A receiver of the output weight's gradient in one backward, in place of autograd."""

    def add(self, hidden: Tensor, gradient: Tensor) -> None:
        """Add ``gradient^T hidden`` to the weight's gradient.

        hidden: [n, h]; gradient: [n, V / tp], the gradient of the logits; both contiguous.
        """

    def for_autograd(self) -> Tensor | None:
        """Return the tensor that autograd receives as the weight's gradient, once everything is added."""


class ProjectionGradients:
    """The gradients of hidden states (dgrad) and weight (wgrad) in one backward, summed over its chunks.

    student_hidden: a function that waits for the hidden states of all tokens, called from the first wgrad on; None
    where the weight needs no gradient.
    hidden: the tensor of hidden states that this rank holds.
    """

    def __init__(
        self,
        layer: _Layer,
        student_hidden: Callable[[], Tensor] | None,
        hidden: Tensor,
        weight: Tensor,
        needs_hidden: bool,
    ) -> None:
        self.placement, self.weight_gradient = layer.placement, layer.weight_gradient
        self.student_hidden, self.hidden, self.weight = student_hidden, hidden, weight
        self.dgrad = hidden.new_empty(layer.num_tokens, hidden.shape[1]) if needs_hidden else None
        self.wgrad: Tensor | None = None
        self.reduced: Callable[[], Tensor] | None = None

    def add(self, tokens: slice, gradient: Tensor, scale: Tensor | None, last: bool) -> None:
        """Add the gradient of the logits of a chunk of tokens, which is only read.

        scale: [n, 1] float32, multiplied into tensors with h columns; None is 1.
        last: whether this is the last chunk: the sum over ranks then starts between its two GEMMs.
        """
        if self.dgrad is not None:
            torch.mm(gradient, self.weight, out=self.dgrad[tokens])
            if scale is not None:
                self.dgrad[tokens].mul_(scale)
            if last:
                self.reduced, self.dgrad = self.placement.start_reduce(self.dgrad, self.hidden), None
        if self.student_hidden is not None and len(gradient):
            chunk = self.student_hidden()[tokens]
            if scale is not None:
                chunk = torch.mul(chunk, scale, out=torch.empty_like(chunk))
            self._add_wgrad(chunk, gradient)

    def _add_wgrad(self, hidden: Tensor, gradient: Tensor) -> None:
        """Add the weight's gradient of one chunk."""
        if self.weight_gradient is not None:
            self.weight_gradient.add(hidden.contiguous(), gradient)
            return
        product = gradient.t().mm(hidden)
        # float32 for several chunks: in bf16 each sum would round away what the earlier chunks have added.
        self.wgrad = product if self.wgrad is None else self.wgrad.float().add_(product)

    def of_hidden(self) -> Tensor | None:
        """Return the gradient of the hidden states that this rank holds, once the sum over ranks is done."""
        return self.reduced() if self.reduced is not None else None

    def of_weight(self) -> Tensor | None:
        """Return the weight's gradient for autograd; None if the weight needs none."""
        if self.student_hidden is None:
            return None
        if self.weight_gradient is not None:
            return self.weight_gradient.for_autograd()
        return torch.zeros_like(self.weight) if self.wgrad is None else self.wgrad.to(self.weight.dtype)


@dataclass(frozen=True)
class HiddenPlacement:
    """The placement of the student's hidden states on the ranks.

    group: the tensor-parallel group; None for one rank.
    gather_indices: None if each rank holds the hidden states of all R tokens.  Else [R] int64, distinct: each rank
    holds a tensor [n, h] of its own, n equal on all ranks, and the hidden state of token i is row gather_indices[i] of
    the tensors of all ranks in rank order.
    """

    group: dist.ProcessGroup | None
    gather_indices: Tensor | None

    @property
    def size(self) -> int:
        """The number of ranks of the group."""
        return group_size(self.group)

    def start_gather(self, held: Tensor) -> Callable[[], Tensor]:
        """Start to gather the hidden states [R, h] of all tokens, and return a function that waits for the result.

        held: the tensor that this rank holds.
        Collectives: one all-gather with gather_indices, which runs while the caller does other work.
        """
        order = self.gather_indices
        if order is None:
            return lambda: held
        if self.size == 1 or len(held) == 0:
            return lambda: held.index_select(0, order)
        all_ranks = held.new_empty(self.size * held.shape[0], held.shape[1])
        handle = all_gather(all_ranks, held.contiguous(), self.group, async_op=True)

        def wait() -> Tensor:
            handle.wait()
            return all_ranks.index_select(0, order)

        return wait

    def start_reduce(self, gradient: Tensor, held: Tensor) -> Callable[[], Tensor]:
        """Start to sum a gradient over the ranks, and return a function that waits for the result.

        gradient: [R, h], this rank's share of the gradient of all tokens' hidden states.
        held: the tensor whose gradient is wanted; the result has its shape, and rows that belong to no token get 0.
        Collectives: one reduce-scatter with gather_indices, else one all-reduce, while the caller does other work.
        """
        out = gradient
        if self.gather_indices is not None:
            all_ranks = gradient.new_zeros(self.size * held.shape[0], held.shape[1])
            gradient = all_ranks.index_copy_(0, self.gather_indices, gradient)
            out = gradient if self.size == 1 else gradient.new_empty(held.shape)
        if self.size == 1 or len(held) == 0:
            return lambda: out
        if self.gather_indices is not None:
            handle = reduce_scatter(out, gradient, self.group)
        else:
            handle = dist.all_reduce(out, group=self.group, async_op=True)

        def wait(summand: Tensor = gradient) -> Tensor:  # keeps the memory that is being read
            handle.wait()
            return out

        return wait


def gather_width(part: Tensor, group: dist.ProcessGroup | None) -> Tensor:
    """Gather [R, h] from slices [R, h / tp] of the width, which the ranks hold in their order.

    Collectives: one all-gather; none for one rank or R = 0.
    """
    size = group_size(group)
    if size == 1 or len(part) == 0:
        return part.repeat(1, size)
    slices = part.new_empty(size * part.shape[0], part.shape[1])
    all_gather(slices, part.contiguous(), group)
    return slices.view(size, *part.shape).transpose(0, 1).flatten(1)
