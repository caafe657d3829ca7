# Copyright (c) 2026 the megatron_selfdistill authors. Apache-2.0.
"""The output layer fused with the loss: from hidden states to divergences without logits of all tokens.

Chunk of tokens by chunk of tokens, student and teacher are projected, and the passes of vocab_parallel.py run.  What is
kept for backward:

    keep_gradient   the gradient of the student's logits for a loss of 1 per token, one [R, V / tp] tensor: backward
                    is one dgrad and one wgrad GEMM; incoming gradients are folded into rows of width h
    low_memory      numbers per token: backward projects each chunk again, without the loss's collectives, and both
                    GEMMs run per chunk

So 4 or 6 GEMMs of R x h x V / tp.  Rows of logits that exist at a time: R + c or 2 c, c the tokens of a chunk, against
2 R where logits are materialised.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from typing import Any, Protocol

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from megatron_selfdistill.choices import FUSED_MODES
from megatron_selfdistill.loss.divergence import Divergence
from megatron_selfdistill.loss.sharded.backend import Backend, chosen
from megatron_selfdistill.loss.sharded.gathered_hidden import HiddenPlacement, gather_width
from megatron_selfdistill.loss.sharded.shard_sums import Shard, TokenConstants
from megatron_selfdistill.loss.sharded.vocab_parallel import TokenStats, VocabShard, make_shard, run_forward
from megatron_selfdistill.loss.target import Target


class WeightGradient(Protocol):
    """Takes the weight's gradient of one backward, in place of autograd."""

    def add(self, hidden: Tensor, gradient: Tensor) -> None:
        """Add ``gradient^T hidden``: hidden [n, h], and the gradient of its logits [n, V / tp]; both contiguous."""

    def for_autograd(self) -> Tensor | None:
        """What autograd is handed for the weight, once all is added."""


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
    chunk_tokens: int = 4096,
    mode: str = "keep_gradient",
    gather_indices: Tensor | None = None,
    weight_gradient: WeightGradient | None = None,
    backend: str | None = None,
) -> TokenStats:
    """``distillation_loss(hidden_s @ student_weight^T, hidden_t @ teacher_weight^T, ...)`` of R response tokens.

    Shapes: weights [V / tp, h], this rank's rows; teacher_weight None: it is the student's.  Hidden states and weights
    have one dtype, that of the logits.  response_tokens [R] int64, global ids.
    student_hidden: [R, h], equal on all ranks of ``vocab.group``.  With gather_indices [R] int64 it is [n, h], this
    rank's own rows, n equal on all ranks, and token i belongs to row gather_indices[i] of the rows of all ranks in rank
    order; the indices are distinct.  Then only the rank's own rows are kept, and gathered once more in backward.
    teacher_hidden: [R, h], equal on all ranks; or [R, h / tp], cut by width in rank order.
    chunk_tokens, mode: see above; what is returned does not depend on them, but for rounding.
    Gradient: to student_hidden (summed over the ranks; with gather_indices that of the rank's own rows, 0 where there
    is no token) and to student_weight.  The incoming gradient may differ between tokens.  weight_gradient: takes it,
    within backward only; without it autograd gets it in the weight's dtype, summed over chunks in float32, which takes
    a float32 copy of the weight's shape in low_memory.
    Statistics, ranks, backend, -inf and NaN: as `distillation_loss`.
    Collectives: per chunk those of `distillation_loss` (three, JSD four, one less for a given beta), and one all-gather
    of the teacher's rows where they are cut.
    With gather_indices one all-gather in forward and another in backward.  In backward one all-reduce of dgrad, or one
    reduce-scatter for gather_indices, while the last wgrad GEMM runs; low_memory gathers the teacher's rows again.
    Raises: ValueError if shapes or dtypes do not fit.
    """
    placement = HiddenPlacement(vocab.group, gather_indices)
    layer = _Layer(
        target,
        divergence,
        vocab,
        chosen(backend, student_hidden, teacher_hidden),
        chunk_tokens,
        response_tokens.shape[0],
        placement,
        weight_gradient,
    )
    _check(layer, mode, student_hidden, teacher_hidden, student_weight, teacher_weight, response_tokens)
    trained = torch.is_grad_enabled() and (student_hidden.requires_grad or student_weight.requires_grad)
    keep = trained and mode == "keep_gradient"
    with torch.no_grad():
        rows = placement.start_gather(student_hidden)()
        logits = _Logits(layer, rows, teacher_hidden, student_weight, teacher_weight, keep)
        stats, constants, kl_value = _forward_chunks(layer, logits, response_tokens)
    if not trained:
        return stats
    kept: tuple[Any, ...] = (logits.kept, None, None, None, None)
    if not keep:
        kept = (None, teacher_hidden, teacher_weight, constants, kl_value)
    return replace(stats, loss=_Backward.apply(student_hidden, student_weight, stats.loss, layer, *kept))


@dataclass(frozen=True)
class _Layer:
    """What forward and backward of one call share, besides tensors that autograd watches over."""

    target: Target
    divergence: Divergence
    vocab: VocabShard
    backend: Backend
    chunk_tokens: int
    num_tokens: int
    placement: HiddenPlacement
    weight_gradient: WeightGradient | None

    def chunks(self) -> Iterator[slice]:
        """Slices of tokens; an empty one where there are no tokens."""
        for start in range(0, max(self.num_tokens, 1), self.chunk_tokens):
            yield slice(start, min(start + self.chunk_tokens, self.num_tokens))

    def shard(self, student_logits: Tensor, teacher_logits: Tensor) -> Shard:
        return make_shard(student_logits, teacher_logits, self.target, self.vocab)

    def write_gradient(
        self, shard: Shard, constants: TokenConstants, kl_value: Tensor, grad_loss: Tensor, out: Tensor
    ) -> None:
        """Into ``out`` [n, V / tp], which may be the student's logits; 0 at padding columns."""
        valid = out[:, : self.vocab.num_valid]
        self.backend.write_gradient(shard, constants, kl_value, self.divergence, grad_loss, valid)
        out[:, self.vocab.num_valid :] = 0


class _Logits:
    """Both logits of one chunk after the other, in the same memory.

    kept: [R, V / tp] or None.  The student's logits of a chunk lie in its rows there, to be overwritten by their
    gradient, and the teacher's lie behind them, where the next chunk will be written, as long as there is room.
    """

    def __init__(
        self,
        layer: _Layer,
        student_rows: Tensor,
        teacher_hidden: Tensor,
        student_weight: Tensor,
        teacher_weight: Tensor | None,
        keep: bool,
    ) -> None:
        self.layer, self.student_rows, self.teacher_hidden = layer, student_rows, teacher_hidden
        self.student_weight, self.teacher_weight = student_weight, teacher_weight
        longest, columns = min(layer.chunk_tokens, layer.num_tokens), student_weight.shape[0]
        self.kept = student_rows.new_empty(layer.num_tokens, columns) if keep else None
        self.block = student_rows.new_empty(longest if keep else 2 * longest, columns)

    def of(self, tokens: slice) -> tuple[Tensor, Tensor]:
        """(student's, teacher's) [n, V / tp], valid until the next call."""
        student, teacher = self.student_rows[tokens], self._teacher_rows(tokens)
        count = len(student)
        both = self.block if self.kept is None else self.kept[tokens.start :]
        if len(both) >= 2 * count:
            both = both[: 2 * count]
            student_logits, teacher_logits = both[:count], both[count:]
        else:
            assert self.kept is not None
            student_logits, teacher_logits = self.kept[tokens], self.block[:count]
        torch.mm(student, self.student_weight.t(), out=student_logits)
        weight = self.student_weight if self.teacher_weight is None else self.teacher_weight
        torch.mm(teacher, weight.t(), out=teacher_logits)
        return student_logits, teacher_logits

    def _teacher_rows(self, tokens: slice) -> Tensor:
        part = self.teacher_hidden[tokens]
        if part.shape[1] == self.student_weight.shape[1]:
            return part
        return gather_width(part, self.layer.vocab.group)


def _forward_chunks(
    layer: _Layer, logits: _Logits, response_tokens: Tensor
) -> tuple[TokenStats, TokenConstants, Tensor]:
    """The statistics of all tokens, and what their gradient takes besides logits; the gradient, where one is kept."""
    stats, constants, kl_values = [], [], []
    for tokens in layer.chunks():
        student_logits, teacher_logits = logits.of(tokens)
        shard = layer.shard(student_logits, teacher_logits)
        forward = run_forward(
            shard, response_tokens[tokens], layer.target, layer.divergence, layer.vocab, layer.backend
        )
        if logits.kept is not None:
            unit = torch.ones_like(forward.kl_value)
            layer.write_gradient(shard, forward.constants, forward.kl_value, unit, logits.kept[tokens])
        stats.append(forward.stats)
        constants.append(forward.constants.tensors())
        kl_values.append(forward.kl_value)
    joined = TokenConstants(*(torch.cat(parts) for parts in zip(*constants, strict=True)))
    return TokenStats.concatenate(stats), joined, torch.cat(kl_values)


class _Backward(torch.autograd.Function):
    """Hands the loss through; backward makes the gradients of hidden states and weight."""

    @staticmethod
    def forward(
        ctx: Any,
        student_hidden: Tensor,
        student_weight: Tensor,
        loss: Tensor,
        layer: _Layer,
        gradient: Tensor | None,
        teacher_hidden: Tensor | None,
        teacher_weight: Tensor | None,
        constants: TokenConstants | None,
        kl_value: Tensor | None,
    ) -> Tensor:
        per_token = constants.tensors() if constants is not None else ()
        ctx.save_for_backward(
            student_hidden, student_weight, gradient, teacher_hidden, teacher_weight, kl_value, *per_token
        )
        ctx.layer = layer
        return loss.clone()

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_loss: Tensor) -> tuple[Tensor | None, ...]:  # type: ignore[override]
        layer, (hidden, weight, kept, teacher_hidden, teacher_weight, kl_value, *constants) = (
            ctx.layer,
            ctx.saved_tensors,
        )
        needs_hidden, needs_weight = ctx.needs_input_grad[:2]
        if kept is not None:
            gathering = layer.placement.start_gather(hidden) if needs_weight else None
            grads = _Gradients(layer, gathering, hidden, weight, needs_hidden)
            grads.add(slice(0, layer.num_tokens), kept, scale=grad_loss[:, None], last=True)
            return grads.of_hidden(), grads.of_weight(), *(None,) * 7
        rows = layer.placement.start_gather(hidden)()
        grads = _Gradients(layer, (lambda: rows) if needs_weight else None, hidden, weight, needs_hidden)
        logits = _Logits(layer, rows, teacher_hidden, weight, teacher_weight, keep=False)
        for tokens in layer.chunks():
            student_logits, teacher_logits = logits.of(tokens)
            shard = layer.shard(student_logits, teacher_logits)
            chunk = TokenConstants(*(values[tokens] for values in constants))
            layer.write_gradient(shard, chunk, kl_value[tokens], grad_loss[tokens].to(shard.dtype), student_logits)
            grads.add(tokens, student_logits, scale=None, last=tokens.stop == layer.num_tokens)
        return grads.of_hidden(), grads.of_weight(), *(None,) * 7


class _Gradients:
    """dgrad and wgrad of one backward, from the gradients of the logits of its chunks.

    rows: waits for the rows of all tokens, which are needed from the first wgrad on; None where the weight needs none.
    """

    def __init__(
        self,
        layer: _Layer,
        rows: Callable[[], Tensor] | None,
        hidden: Tensor,
        weight: Tensor,
        needs_hidden: bool,
    ) -> None:
        self.layer, self.rows, self.hidden, self.weight = layer, rows, hidden, weight
        self.dgrad = hidden.new_empty(layer.num_tokens, hidden.shape[1]) if needs_hidden else None
        self.wgrad: Tensor | None = None
        self.reduced: Callable[[], Tensor] | None = None

    def add(self, tokens: slice, gradient: Tensor, scale: Tensor | None, last: bool) -> None:
        """``scale`` [n, 1] float32 is folded into what has h columns, so that ``gradient`` is only read.  The sum over
        ranks starts between the last two GEMMs."""
        if self.dgrad is not None:
            torch.mm(gradient, self.weight, out=self.dgrad[tokens])
            if scale is not None:
                self.dgrad[tokens].mul_(scale)
            if last:
                self.reduced, self.dgrad = self.layer.placement.start_reduce(self.dgrad, self.hidden), None
        if self.rows is not None and len(gradient):
            rows = self.rows()[tokens]
            if scale is not None:
                rows = torch.mul(rows, scale, out=torch.empty_like(rows))
            self._add_wgrad(rows, gradient)

    def _add_wgrad(self, rows: Tensor, gradient: Tensor) -> None:
        if self.layer.weight_gradient is not None:
            self.layer.weight_gradient.add(rows.contiguous(), gradient)
            return
        product = gradient.t().mm(rows)
        # Of several chunks in float32: each sum in bf16 would round away what the chunks before have added.
        self.wgrad = product if self.wgrad is None else self.wgrad.float().add_(product)

    def of_hidden(self) -> Tensor | None:
        return self.reduced() if self.reduced is not None else None

    def of_weight(self) -> Tensor | None:
        if self.rows is None:
            return None
        if self.layer.weight_gradient is not None:
            return self.layer.weight_gradient.for_autograd()
        return torch.zeros_like(self.weight) if self.wgrad is None else self.wgrad.to(self.weight.dtype)


def _check(
    layer: _Layer,
    mode: str,
    student_hidden: Tensor,
    teacher_hidden: Tensor,
    student_weight: Tensor,
    teacher_weight: Tensor | None,
    response_tokens: Tensor,
) -> None:
    name, size, width = "fused_distillation_loss", layer.vocab.size, student_weight.shape[-1]
    rows, gather_indices = layer.num_tokens, layer.placement.gather_indices
    if mode not in FUSED_MODES or layer.chunk_tokens < 1:
        raise ValueError(
            f"{name}: mode must be one of {', '.join(FUSED_MODES)} and chunk_tokens at least 1; "
            f"got {mode!r} and {layer.chunk_tokens}."
        )
    for weight in (student_weight, teacher_weight):
        if weight is not None and tuple(weight.shape) != (size, width):
            raise ValueError(
                f"{name}: weights must be [{size}, {width}], this VocabShard's; got {tuple(weight.shape)}."
            )
    held, cut = student_hidden.shape[0] if gather_indices is not None else rows, width // layer.placement.size
    shapes = tuple(student_hidden.shape), tuple(teacher_hidden.shape)
    if shapes[0] != (held, width) or shapes[1] not in ((rows, width), (rows, cut)):
        raise ValueError(
            f"{name}: student_hidden must be [{held}, {width}] and teacher_hidden [{rows}, {width}] or "
            f"[{rows}, {cut}]; got {shapes[0]} and {shapes[1]}."
        )
    for what, index in (("response_tokens", response_tokens), ("gather_indices", gather_indices)):
        if index is not None and (tuple(index.shape) != (rows,) or index.dtype != torch.int64):
            raise ValueError(
                f"{name}: {what} must be int64 of shape ({rows},), one per token; "
                f"got {index.dtype} of shape {tuple(index.shape)}."
            )
    dtypes = {x.dtype for x in (student_hidden, teacher_hidden, student_weight, teacher_weight) if x is not None}
    if len(dtypes) > 1:
        raise ValueError(f"{name}: hidden states and weights must have one dtype; got {sorted(map(str, dtypes))}.")
