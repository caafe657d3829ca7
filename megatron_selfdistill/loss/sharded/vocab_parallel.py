# Copyright (c) 2026 the megatron_selfdistill authors. Apache-2.0.
"""The self-distillation loss of logits whose vocabulary is split over a tensor-parallel group.

Forward and backward are written by hand; README.md in `loss` has the passes over the logits and the gathers after each
pass.  Sums are taken in float32 (float64 for float64 logits); merging and solving run in float64 on [T, J] numbers.
`vocab_entropy`, the entropy of a model's own softmax, comes from the first pass alone.

A `Backend` is PyTorch, which defines the sharded loss, or the kernels of the annex ``kernels``, which are faster.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, fields, replace
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from megatron_selfdistill.annexes import door
from megatron_selfdistill.choices import LOSS_BACKENDS
from megatron_selfdistill.loss.divergence import forward_share
from megatron_selfdistill.loss.jsd_and_renyi import renyi_value
from megatron_selfdistill.loss.sharded import contrast, jsd_and_renyi_passes, shard_sums, token_statistics
from megatron_selfdistill.loss.sharded.group_collectives import all_gather
from megatron_selfdistill.loss.sharded.shard_sums import (
    FIRST_PASS,
    BetaGrid,
    LogProbGradient,
    Shard,
    TokenConstants,
    mix_unit,
)
from megatron_selfdistill.loss.sharded.token_statistics import Softmax, TokenResults
from megatron_selfdistill.loss.target import Divergence, Target, check_arguments


@dataclass(frozen=True)
class VocabShard:
    """The columns of the vocabulary that this rank holds.

    start: the first global column.
    size: the number of columns on this rank, equal on all ranks of ``group``.
    vocab_size: the number of valid columns of the whole vocabulary; later columns are padding, and the loss ignores
    them.
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
        """The number of columns of this shard that are not padding: 0 .. size."""
        return min(self.size, max(0, self.vocab_size - self.start))

    @classmethod
    def from_group(cls, padded_vocab_size: int, vocab_size: int, group: dist.ProcessGroup | None) -> VocabShard:
        """Return the shard of this rank of ``group``, as Megatron splits an output layer: equally, in rank order.

        Raises: ValueError if the padded vocabulary cannot be split equally or is smaller than the vocabulary.
        """
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
    """The loss and the statistics of T response tokens, equal on all ranks of the group.

    The dtype is float32, or float64 for float64 logits.  Entropies, divergences and log-probs are in nats.
    Only ``loss`` and ``student_log_prob`` carry a gradient, to the student's logits.
    """

    loss: Tensor
    """[T] the divergence."""
    reverse_kl: Tensor
    """[T] KL(p || q) = KL(student || target), whatever the divergence; +inf where q is 0 and p is not."""
    student_entropy: Tensor
    """[T] H(p)."""
    teacher_entropy: Tensor
    """[T] H(softmax(t)).  With a reference or controls this, ``teacher_log_prob`` and ``top1_agreement`` describe no
    teacher: the loss receives other logits in place of t, sets the two numbers to NaN and the agreement to False."""
    target_entropy: Tensor
    """[T] H(q)."""
    wanted_entropy: Tensor
    """[T] the entropy that k is to give to the target: H(p), or the reference's."""
    beta: Tensor
    """[T] 1 / k; 1 under teacher_alone, where q = softmax(t)."""
    status: Tensor
    """[T] int64, values of ``Status``."""
    student_log_prob: Tensor
    """[T] log p of the response token, with a gradient of its own; NaN if the token is no valid column."""
    teacher_log_prob: Tensor
    """[T] log softmax(t) of the response token; NaN if the token is no valid column."""
    target_log_prob: Tensor
    """[T] log q of the response token; NaN if the token is no valid column."""
    top1_agreement: Tensor
    """[T] bool: whether student and teacher have the same argmax; of equal maxima the lowest column counts."""
    grid_betas: Tensor
    """[J] the betas at which the entropy of the mix was taken: ``beta_grid(target)``."""
    grid_entropies: Tensor
    """[T, J] H(softmax(grid_betas[j] m))."""

    @classmethod
    def concatenate(cls, parts: Sequence[TokenStats]) -> TokenStats:
        """Return the statistics of the tokens of all parts in their order; the parts, at least one, have one target."""
        per_token = [f.name for f in fields(cls) if f.name != "grid_betas"]
        values = {name: torch.cat([getattr(part, name) for part in parts]) for name in per_token}
        return cls(**values, grid_betas=parts[0].grid_betas)

    def detached(self) -> TokenStats:
        """Return the same statistics without gradients."""
        return TokenStats(**{f.name: getattr(self, f.name).detach() for f in fields(self)})


Observer = Callable[[slice, Tensor, Tensor, TokenStats], None]
"""A function of a chunk of tokens, their logits of student and teacher, and their statistics.

The function only reads the logits, which are valid until it returns.
"""


@dataclass(frozen=True)
class TokenOptions:
    """The inputs of a loss that the R response tokens of some microbatches have beside their logits."""

    reference_entropy: Tensor | None = None
    """The reference's entropy [R] in nats, float64, if the target matches it."""
    teacher_weights: Tensor | None = None
    """The teacher's weight w of each token [R], float64; None is the weight of the target."""
    observe: Observer | None = None
    """The function that reads the logits of each chunk of tokens."""


NO_OPTIONS = TokenOptions()
"""The options of tokens that have nothing beside their logits."""


def distillation_loss(
    student_logits: Tensor,
    teacher_logits: Tensor,
    response_tokens: Tensor,
    *,
    target: Target,
    divergence: Divergence,
    vocab: VocabShard,
    reference_entropy: Tensor | None = None,
    teacher_weights: Tensor | None = None,
    inplace_backward: bool = False,
    backend: str | None = None,
) -> TokenStats:
    """Return the divergence between student and mixed target of every response token, with its statistics.

    The loss equals ``divergence(log_softmax(s), mixed_target(s, t, target).log_q, divergence)`` on the valid columns of
    all ranks together.
    Shapes: both logits [T, vocab.size], any float dtype; response_tokens [T] int64, global ids.
    Reference: with ``target.is_anchored`` the teacher's logits are those of the mix, (w t + r) / (1 + w), and the loss
    equals ``mixed_target(s, t, target, r)``.  reference_entropy: [T] H(softmax(r)) in nats, given if and only if
    ``target.needs_reference_entropy``.  With a share of a reference the teacher's logits are `target.shared_mix`, and
    the entropy is that of `target.joint_anchor`.
    Controls: with ``target.num_controls`` the teacher's logits are t - c, see `control.contrast`, and with a reference
    too w (t - c) + r.
    Per token: teacher_weights [T], with a reference and no controls: each token's own w >= 0, with which the caller has
    mixed; the target of the token is ``target.with_teacher_weight(w)``.
    Ranks: T and response_tokens are equal on all ranks of ``vocab.group``, and so is the result.
    Gradient: to ``student_logits`` s only, in their dtype; the target is a constant; 0 at padding columns.  ``loss``
    and ``student_log_prob`` are differentiable, and one pass writes the gradient of both, ``grad_loss dD / ds +
    grad_log_prob (onehot(response token) - p)``; the second term costs nothing where only the loss is used.  A token
    that is no valid column has a log-prob of NaN, whose gradient is NaN unless the incoming gradient is 0.
    inplace_backward: backward writes the gradient over the student's logits, which nobody may read afterwards.
    backend: "torch", "triton", or None for the default of `chosen`; equal on all ranks.
    -inf: a column with -inf in the student and in the teacher does not exist.  Where only the teacher has -inf, q = 0,
    and KL(p || q) is +inf with a gradient that is not finite: mask such columns in the student too, or use another
    divergence.  Where only the student has -inf, p = q = 0; under teacher_alone KL(q || p) is +inf.
    NaN: a token with NaN or +inf in its logits gives NaN for this token only.
    Accuracy: |H(q) - H(p)| <= 1e-5 nats for every token that is MATCHED, whatever the shape of its logits; a token
    whose root is not reached to this accuracy is UNCONVERGED.
    Collectives: three all-gathers (JSD four; one less where the rule gives beta), none in backward, none for T = 0.
    Kept for backward: both logits, seven numbers per token (eight with `Divergence.forward_above`) and response_tokens.
    README.md in `loss` has reads, writes and temporaries.
    Raises: ValueError if shapes do not fit, or for a backend that cannot run.
    """
    check_arguments("distillation_loss", locals())
    check_reference("distillation_loss", target, reference_entropy, teacher_weights)
    chosen_backend = chosen(backend, student_logits, teacher_logits)
    with torch.no_grad():
        shard = make_shard(student_logits, teacher_logits, target, vocab)
        forward = run_forward(
            shard,
            response_tokens,
            target,
            divergence,
            vocab,
            chosen_backend,
            reference_entropy=reference_entropy,
            teacher_weights=teacher_weights,
        )
    options = divergence, shard, vocab, inplace_backward, chosen_backend
    loss, log_prob = _HandWrittenBackward.apply(  # type: ignore[no-untyped-call]
        student_logits, teacher_logits, response_tokens, forward, *options
    )
    return replace(forward.stats, loss=loss, student_log_prob=log_prob)


def make_shard(student_logits: Tensor, teacher_logits: Tensor, target: Target, vocab: VocabShard) -> Shard:
    """Return the valid columns of both logits on this rank, and how the target mixes them."""
    dtype = torch.promote_types(torch.promote_types(student_logits.dtype, teacher_logits.dtype), torch.float32)
    valid = slice(0, vocab.num_valid)
    return Shard(student_logits[:, valid], teacher_logits[:, valid], BetaGrid.of(target, dtype).mix_weights, dtype)


def solve_shard(
    shard: Shard,
    response_tokens: Tensor | None,
    grid: BetaGrid,
    vocab: VocabShard,
    backend: Backend,
    *,
    forward_kl: bool,
    reference_entropy: Tensor | None = None,
) -> tuple[Shard, TokenResults]:
    """Return the shard as the passes cut it, and the results of every token.

    Collectives: three all-gathers over ``vocab.group``, two with a given beta.
    """
    shard = replace(shard, num_parts=backend.num_parts(shard.student.shape[0], vocab.size))
    sums, mix_argmax = backend.first_pass(shard, grid, response_tokens, vocab.start)
    solver_state = backend.solve_tokens(gather_parts(sums, vocab.group), grid, reference_entropy)
    status: Tensor | None = None
    for _ in range(1 if grid.given else 2):
        sums = backend.second_pass(shard, solver_state.constants, mix_argmax, forward_kl=forward_kl, status=status)
        gathered = gather_parts(sums, vocab.group)
        results, solver_state = backend.finish_tokens(solver_state, gathered, grid, response_tokens, vocab.vocab_size)
        status = results.status
    return shard, results


@dataclass(frozen=True)
class ForwardResult:
    """The result of a forward pass.

    stats: all of TokenStats; constants and kl_value, [T] each: the numbers per token that backward needs, see
    `write_gradient`.
    forward_shares: [T] `divergence.forward_share` of the tokens; None if the divergence has no ``forward_above``.
    """

    stats: TokenStats
    constants: TokenConstants
    kl_value: Tensor
    forward_shares: Tensor | None = None


def run_forward(
    shard: Shard,
    response_tokens: Tensor,
    target: Target,
    divergence: Divergence,
    vocab: VocabShard,
    backend: Backend,
    *,
    reference_entropy: Tensor | None = None,
    teacher_weights: Tensor | None = None,
) -> ForwardResult:
    """Return the statistics of the tokens, and what backward needs besides the logits.

    Collectives: as `distillation_loss`.
    """
    grid, forward_kl = BetaGrid.of(target, shard.dtype), divergence.needs_forward_kl
    shard, results = solve_shard(
        shard, response_tokens, grid, vocab, backend, forward_kl=forward_kl, reference_entropy=reference_entropy
    )
    loss, forward_shares = results.reverse_kl, None
    kl_value = loss
    if divergence.forward_above is not None:
        forward_shares = forward_share(results.target_entropy, divergence.forward_above)
        loss = torch.where(forward_shares > 0, results.reverse_kl + results.forward_kl, results.reverse_kl)
    elif divergence.is_renyi:
        parts = gather_parts(backend.renyi_pass(shard, results.constants, divergence), vocab.group).double()
        loss = renyi_value(parts[..., 0].sum(0), parts[..., 1].logsumexp(0), divergence).to(shard.dtype)
        kl_value = loss
    elif forward_kl:
        loss = results.forward_kl
    elif divergence.kind == "jsd":
        parts = gather_parts(backend.jsd_pass(shard, results.constants, divergence.jsd_lambda), vocab.group)
        loss, kl_value = parts.double().sum(0).to(shard.dtype).unbind(1)
        loss = loss.clamp(min=0)
    stats = TokenStats(
        loss=loss,
        reverse_kl=results.reverse_kl,
        student_entropy=results.student_entropy,
        teacher_entropy=results.teacher_entropy,
        target_entropy=results.target_entropy,
        wanted_entropy=results.student_entropy if reference_entropy is None else reference_entropy.to(shard.dtype),
        beta=(results.beta / mix_unit(target, teacher_weights)).to(shard.dtype),
        status=results.status,
        student_log_prob=results.student_log_prob,
        teacher_log_prob=results.teacher_log_prob,
        target_log_prob=results.target_log_prob,
        top1_agreement=results.top1_agreement,
        grid_betas=grid.reported(loss.device),
        grid_entropies=results.grid_entropies,
    )
    if not target.reads_teacher:
        unknown = torch.full_like(loss, torch.nan)
        stats = replace(
            stats,
            teacher_entropy=unknown,
            teacher_log_prob=unknown,
            top1_agreement=torch.zeros_like(results.top1_agreement),
        )
    return ForwardResult(stats, results.constants, kl_value, forward_shares)


def gather_parts(parts: Tensor, group: dist.ProcessGroup | None) -> Tensor:
    """Gather [n, T, columns] of every rank into [tp_size * n, T, columns], in rank order.

    Each rank sums this result over the ranks by itself: an all-reduce need not give every rank the same bits.
    """
    if group is None or parts.shape[1] == 0 or dist.get_world_size(group) == 1:
        return parts
    gathered = parts.new_empty(dist.get_world_size(group) * parts.shape[0], *parts.shape[1:])
    all_gather(gathered, parts.contiguous(), group)
    return gathered


class _HandWrittenBackward(torch.autograd.Function):
    """The autograd function that returns the loss and log p, and writes the gradient of the student's logits."""

    @staticmethod
    def forward(
        ctx: Any,
        student_logits: Tensor,
        teacher_logits: Tensor,
        response_tokens: Tensor,
        result: ForwardResult,
        divergence: Divergence,
        shard: Shard,
        vocab: VocabShard,
        inplace: bool,
        backend: Backend,
    ) -> tuple[Tensor, Tensor]:
        per_token = response_tokens, result.kl_value, result.forward_shares, *result.constants.tensors()
        ctx.save_for_backward(student_logits, teacher_logits, *per_token)
        ctx.set_materialize_grads(False)  # an output that nobody uses has no gradient, not a gradient of zeros
        ctx.divergence, ctx.inplace, ctx.backend, ctx.vocab = divergence, inplace, backend, vocab
        ctx.mix_weights, ctx.dtype = shard.mix_weights, shard.dtype
        return result.stats.loss.clone(), result.stats.student_log_prob.clone()

    @staticmethod
    def backward(ctx: Any, grad_loss: Tensor | None, grad_log_prob: Tensor | None) -> tuple[Tensor | None, ...]:
        student_logits, teacher_logits, response_tokens, kl_value, shares, *constants = ctx.saved_tensors
        grad_loss = torch.zeros_like(kl_value) if grad_loss is None else grad_loss.to(ctx.dtype)
        log_prob = LogProbGradient.of(grad_log_prob, response_tokens, ctx.vocab.start, ctx.vocab.vocab_size)
        # detach shares the version counter: autograd refuses a second backward through overwritten logits
        gradient = student_logits.detach() if ctx.inplace else torch.empty_like(student_logits)
        valid = slice(0, ctx.vocab.num_valid)
        shard = Shard(student_logits.detach()[:, valid], teacher_logits[:, valid], ctx.mix_weights, ctx.dtype)
        options = ctx.divergence, grad_loss, gradient[:, valid], log_prob, shares
        ctx.backend.write_gradient(shard, TokenConstants(*constants), kl_value, *options)
        gradient[:, ctx.vocab.num_valid :] = 0
        return gradient, *(None,) * 8


_COLUMNS = [FIRST_PASS.index(f"student_{name}") for name in ("max", "tail", "first", "argmax")]


@torch.no_grad()
def vocab_entropy(logits: Tensor, vocab: VocabShard, *, backend: str | None = None) -> Tensor:
    """Return H(softmax(logits)) of T tokens in nats, [T] float64, equal on all ranks of ``vocab.group``.

    Shapes, ranks, backend, -inf and NaN: as `distillation_loss`.
    Collectives: one all-gather over ``vocab.group``, none for T = 0.
    Raises: ValueError if the shape does not fit, or for a backend that cannot run.
    """
    check_arguments("vocab_entropy", locals())
    dtype = torch.promote_types(logits.dtype, torch.float32)
    backend_in_use, valid = chosen(backend, logits, logits), logits[:, : vocab.num_valid]
    shard = Shard(valid, valid, (1.0, 0.0), dtype, backend_in_use.num_parts(len(logits), vocab.size))
    grid = BetaGrid.of(Target("teacher_alone", anchor="student"), dtype)
    sums, _ = backend_in_use.first_pass(shard, grid, None, vocab.start)
    return Softmax.merge(*gather_parts(sums[..., _COLUMNS], vocab.group).double().unbind(2)).entropy


def check_reference(
    caller: str,
    target: Target,
    reference_entropy: Tensor | None,
    teacher_weights: Tensor | None = None,
    *,
    reads_reference: bool = False,
) -> None:
    """Raise ValueError unless reference_entropy and teacher_weights are given as `distillation_loss` says.

    reads_reference: whether the caller computes the entropy of an anchor with a share of a reference itself.
    """
    needed = target.needs_reference_entropy and not (reads_reference and target.reference_share)
    if (reference_entropy is not None) != needed:
        raise ValueError(
            f"{caller}: reference_entropy must be {'[T]' if needed else 'None'} with rule {target.rule}, anchor "
            f"{target.anchor} and match {target.match}; got {'None' if needed else 'entropies'}."
        )
    if teacher_weights is not None:
        if not target.is_anchored or target.num_controls:
            raise ValueError(
                f"{caller}: teacher_weights per token need a target with anchor=reference and no controls, whose mix "
                f"the caller computes; got anchor={target.anchor} and {target.num_controls} controls."
            )
        target.with_teacher_weight(target.teacher_weight)  # refuses a number for k or k_max


@dataclass(frozen=True)
class Backend:
    """The passes over the logits, and the solving between them.

    `shard_sums` and `token_statistics` have the contracts.
    num_parts: takes (T, columns per rank) and returns into how many parts each row is cut, the same number on all
    ranks.
    solve_tokens: returns a state, whose ``constants`` are for second_pass.
    row_log_sums, contrast: see `contrast`.
    finish_tokens: takes this state and returns the results with a new state, whose ``constants`` are for another
    second_pass.
    """

    name: str
    num_parts: Callable[[int, int], int]
    first_pass: Callable[..., tuple[Tensor, Tensor]]
    solve_tokens: Callable[..., Any]
    second_pass: Callable[..., Tensor]
    finish_tokens: Callable[..., tuple[TokenResults, Any]]
    jsd_pass: Callable[[shard_sums.Shard, TokenConstants, float], Tensor]
    renyi_pass: Callable[[shard_sums.Shard, TokenConstants, Divergence], Tensor]
    write_gradient: Callable[..., None]
    row_log_sums: Callable[[Tensor, int], Tensor]
    contrast: Callable[[Tensor, Tensor, Tensor], Tensor]


def chosen(name: str | None, student_logits: Tensor, teacher_logits: Tensor) -> Backend:
    """Return the backend for these logits.

    name: "torch" or "triton"; None is triton on GPUs where nothing prevents it, see `in_use`, else torch.
    Raises: ValueError for another name, and for "triton" where it cannot run.
    """
    dtype = torch.promote_types(student_logits.dtype, teacher_logits.dtype)
    found: Backend = _TORCH if in_use(name, student_logits.device, dtype)[0] == "torch" else door("kernels").backend()
    return found


def in_use(name: str | None, device: torch.device, dtype: torch.dtype) -> tuple[str, str]:
    """Return (name, why): the backend that `chosen` takes for logits of this dtype on this device, and the reason.

    Raises: ValueError as `chosen`.
    """
    if name is not None and name not in LOSS_BACKENDS:
        raise ValueError(f"loss.backend must be null, {' or '.join(LOSS_BACKENDS)}; got {name!r}.")
    if name is None and device.type == "cpu":
        return "torch", "the logits lie on cpu"
    if name == "torch":
        return "torch", "as configured"
    against = door("kernels").reason_against(device, dtype)
    if name is None:
        return ("torch", against) if against else ("triton", f"logits on {device.type}")
    if against:
        raise ValueError(f"loss.backend={name} cannot be used: {against}. Set loss.backend to torch or null.")
    return name, "as configured"


_TORCH = Backend(
    name="torch",
    num_parts=lambda num_rows, num_columns: 1,
    first_pass=shard_sums.first_pass,
    solve_tokens=token_statistics.solve_tokens,
    second_pass=shard_sums.second_pass,
    finish_tokens=token_statistics.finish_tokens,
    jsd_pass=jsd_and_renyi_passes.jsd_pass,
    renyi_pass=jsd_and_renyi_passes.renyi_pass,
    write_gradient=shard_sums.write_gradient,
    row_log_sums=contrast.row_log_sums,
    contrast=contrast.contrast,
)
