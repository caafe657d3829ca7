# Copyright (c) 2026 the megatron_selfdistill authors. Apache-2.0.
"""The loss in one call, for a trainer of your own: logits or hidden states of whole batches, a mask, and a reduction.

`self_distillation_loss` takes logits of any leading shape, and `linear_self_distillation_loss` the hidden states and
the weight of the output layer, whose logits it makes for a few tokens at a time.  Both are `distillation_loss` and
`fused_distillation_loss` with the conventions of trainers; the numbers are the same.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable
from typing import ParamSpec

import torch
import torch.distributed as dist
from torch import Tensor

from megatron_selfdistill.loss.joint_anchor import joint_anchor, shared_mix
from megatron_selfdistill.loss.sharded.fused_linear import fused_distillation_loss
from megatron_selfdistill.loss.sharded.subtracted_controls import log_normalisers
from megatron_selfdistill.loss.sharded.vocab_parallel import VocabShard, distillation_loss, vocab_entropy
from megatron_selfdistill.loss.sharded.vocab_parallel import chosen as chosen_backend
from megatron_selfdistill.loss.target import Divergence, Target, check_arguments, check_controls, mixed_logits

IGNORED = -100
"""The label of a position without a loss, as in ``torch.nn.functional.cross_entropy``."""

P = ParamSpec("P")


def _outside_of_graphs(function: Callable[P, Tensor]) -> Callable[P, Tensor]:
    """Return ``function``, which runs uncompiled where a function that `torch.compile` compiles calls it.

    ``torch.compiler.disable`` as a decorator would import the compiler with the loss, which takes seconds.
    """

    @functools.wraps(function)
    def call(*args: P.args, **kwargs: P.kwargs) -> Tensor:
        run = torch.compiler.disable(function) if torch.compiler.is_compiling() else function
        return run(*args, **kwargs)

    return call


@_outside_of_graphs
def self_distillation_loss(
    student_logits: Tensor,
    teacher_logits: Tensor,
    reference_logits: Tensor | None = None,
    labels_or_mask: Tensor | None = None,
    *,
    control_logits: Tensor | None = None,
    target: Target | None = None,
    divergence: str | Divergence = "reverse_kl",
    reduction: str = "mean",
    num_items_in_batch: int | Tensor | None = None,
    vocab_size: int | None = None,
    process_group: dist.ProcessGroup | None = None,
    check_nan: bool | None = None,
) -> Tensor:
    """Return the divergence between the student and the mix of teacher and anchor, reduced over the positions.

    q = softmax((w t + r) / k), with k per position so that H(q) = H(softmax(r)), at most 1 + w; loss D(p, q) in nats.
    Shapes: all logits [..., V], such as [b, s, V] or packed rows [n, V], of one shape; V is this rank's part of the
    vocabulary where ``process_group`` cuts it.  Row i of all three must predict the same token of the response: the
    prompts of student and teacher have different lengths, so that the caller picks the response's positions, and
    nothing is shifted here.
    reference_logits: those of the frozen start on the student's context, given if and only if the target's anchor is a
    reference, as that of `Target()`, or has a share of one; ``Target(anchor="student")`` mixes with the student itself.
    control_logits: [K, ..., V], those of the teacher on the same response after the hints of K other problems in place
    of this one's, with ``Target(num_controls=K)``: then m = w (t - c) + a, where c is the log of the mean of their
    probabilities, and k is at most 1.
    labels_or_mask: [...] integer labels, of which `IGNORED` has no loss, or [...] bool; None: every position has one.
    Labels may come as they are, since the loss reads only where they are ignored.  On a GPU the host waits to count
    the positions; without labels_or_mask it does not wait.
    reduction: "mean" over the positions with a loss, "sum", or "none": [...] float32 with 0 elsewhere.
    num_items_in_batch: divides the sum in place of the number of positions here, as the Trainer of transformers counts
    them over accumulated batches; with reduction="mean" only.
    vocab_size: columns from here on are padding; None: there is none.
    Gradient: to student_logits only; teacher, reference and target are constants.
    Ranks: with a process_group the result and the labels are equal on its ranks, each of which holds V consecutive
    columns in rank order.  Collectives: those of `distillation_loss`, none in backward.  Of a DTensor with the
    placement ``Shard(-1)`` pass ``to_local()``, and as process_group the group of this dimension of its mesh.
    NaN: a position with NaN or +inf in its logits has a loss of NaN, and one with -inf in the teacher's alone an
    infinite reverse KL, whose gradient is not finite.  check_nan: whether a loss that is not finite is an error, for
    which the host must read the losses; None: only on a CPU, where this costs no wait.
    Memory: [n, V] for the gradient; with a reference [n, V] for the mix, at least float32, until backward; copies of
    the rows with a loss where a mask leaves some out.
    torch.compile: the loss runs uncompiled and breaks the graph, which ``fullgraph=True`` refuses.  torch.func: its
    transforms raise RuntimeError.  Second derivatives: none, since the gradient is a constant for autograd.  Autocast
    changes nothing inside.
    Raises: ValueError, which names the argument: for shapes that disagree, labels outside of the vocabulary or a mask
    of integers, no position with a loss, a reference that is missing or not asked for, and losses that are not finite.
    """
    target, divergence = Target() if target is None else target, _divergence(divergence)
    what = "self_distillation_loss"
    check_arguments(what, locals())
    check_controls(what, "control_logits", control_logits, target)
    _check(what, "reference_logits", reference_logits is not None, target, reduction, num_items_in_batch is not None)
    vocab = _vocab(student_logits.size(-1), vocab_size, process_group)
    chosen = _chosen(what, student_logits, labels_or_mask, vocab)
    student, teacher = (_rows(logits, chosen) for logits in (student_logits, teacher_logits))
    entropy = None
    if control_logits is not None:
        with torch.no_grad():
            controls = _rows_of_each(control_logits, chosen)
            backend = chosen_backend(None, controls, teacher)
            teacher = backend.contrast(teacher, controls, log_normalisers(controls, vocab, backend))
    if reference_logits is not None:
        reference, weight = _rows(reference_logits, chosen), target.teacher_weight
        with torch.no_grad():
            anchor = joint_anchor(student, reference, target) if target.reference_share else reference
            entropy = vocab_entropy(anchor, vocab) if target.needs_reference_entropy else None
            if target.reference_share:
                teacher = shared_mix(reference, teacher, target)
            else:
                wide = torch.promote_types(torch.promote_types(reference.dtype, teacher.dtype), torch.float32)
                mix = mixed_logits(reference.to(wide), teacher, weight, 1.0)
                # With weight 0 the mix may be the caller's tensor.
                teacher = mix.div_(target.geometric_k) if weight else mix
    stats = distillation_loss(
        student,
        teacher.detach(),
        torch.zeros(len(student), dtype=torch.int64, device=student.device),
        target=target,
        divergence=divergence,
        vocab=vocab,
        reference_entropy=entropy,
    )
    _check_nan("self_distillation_loss", stats.loss, chosen, student_logits.shape[:-1], check_nan)
    return _reduced(stats.loss, chosen, student_logits.shape[:-1], reduction, num_items_in_batch)


@_outside_of_graphs
def linear_self_distillation_loss(
    student_hidden: Tensor,
    student_weight: Tensor,
    teacher_hidden: Tensor,
    teacher_weight: Tensor | None = None,
    reference_hidden: Tensor | None = None,
    reference_weight: Tensor | None = None,
    labels_or_mask: Tensor | None = None,
    *,
    control_hidden: Tensor | None = None,
    target: Target | None = None,
    divergence: str | Divergence = "reverse_kl",
    reduction: str = "mean",
    num_items_in_batch: int | Tensor | None = None,
    vocab_size: int | None = None,
    chunk_tokens: int = 1024,
    mode: str = "low_memory",
    check_nan: bool | None = None,
) -> Tensor:
    """Return `self_distillation_loss` of the logits hidden @ weight^T, of which 2 ``chunk_tokens`` rows exist at once.

    Shapes: hidden states [..., h], of one shape, and weights [V, h], all of one dtype; None for a weight is that of the
    student.  An output layer with a bias or a bound of the logits is not linear: use `self_distillation_loss`.
    Gradient: to student_hidden and student_weight.
    mode: "low_memory" computes the logits of every chunk again in backward; "keep_gradient" keeps the gradient of the
    student's logits [n, V] instead, and saves two of six products with a weight.
    control_hidden: [K, ..., h], with the teacher's weight; as control_logits.
    Everything else: as `self_distillation_loss`, on one rank.
    """
    target, divergence = Target() if target is None else target, _divergence(divergence)
    what = "linear_self_distillation_loss"
    check_arguments(what, locals())
    check_controls(what, "control_hidden", control_hidden, target)
    _check(what, "reference_hidden", reference_hidden is not None, target, reduction, num_items_in_batch is not None)
    vocab = _vocab(len(student_weight), vocab_size, None)
    chosen = _chosen(what, student_hidden, labels_or_mask, vocab)
    student, teacher = _rows(student_hidden, chosen), _rows(teacher_hidden, chosen).detach()
    theirs = student_weight.detach() if teacher_weight is None else teacher_weight.detach()
    entropy, reference = None, None
    if reference_hidden is None and reference_weight is not None:
        raise ValueError(f"{what}: reference_weight needs reference_hidden; got the weight alone.")
    if reference_hidden is not None:
        own = student_weight.detach() if reference_weight is None else reference_weight.detach()
        reference = _rows(reference_hidden, chosen).detach(), own
        if target.needs_reference_entropy and target.is_anchored:
            with torch.no_grad():
                parts = [vocab_entropy(part @ own.t(), vocab) for part in reference[0].split(int(chunk_tokens))]
                entropy = torch.cat(parts)
    stats = fused_distillation_loss(
        student,
        teacher,
        student_weight,
        theirs,
        torch.zeros(len(student), dtype=torch.int64, device=student.device),
        target=target,
        divergence=divergence,
        vocab=vocab,
        reference_entropy=entropy,
        reference=reference,
        control_hidden=None if control_hidden is None else _rows_of_each(control_hidden, chosen),
        chunk_tokens=chunk_tokens,
        mode=mode,
    )
    _check_nan(what, stats.loss, chosen, student_hidden.shape[:-1], check_nan)
    return _reduced(stats.loss, chosen, student_hidden.shape[:-1], reduction, num_items_in_batch)


def _check(what: str, name: str, is_given: bool, target: Target, reduction: str, is_counted: bool) -> None:
    """Raise ValueError for arguments that do not go together."""
    if target.has_reference != is_given:
        raise ValueError(
            f"{what}: {name} must be given if and only if the target's anchor has a reference, as that of Target() "
            f'is; got {"one" if is_given else "none"} with {target}; Target(anchor="student") needs none.'
        )
    if target.rule == "batch" and target.k is None:
        raise ValueError(f"{what}: the rule batch solves one k for a whole step: give k (`solve_batch_k`); got None.")
    if reduction not in ("mean", "sum", "none"):
        raise ValueError(f"{what}: reduction must be mean, sum or none; got {reduction!r}.")
    if is_counted and reduction != "mean":
        raise ValueError(f"{what}: num_items_in_batch divides a mean; got it with reduction={reduction!r}.")


def _chosen(what: str, student: Tensor, labels_or_mask: Tensor | None, vocab: VocabShard) -> Tensor | None:
    """Return which rows of ``student`` have a loss, [n] bool; None for all of them."""
    mask = labels_or_mask
    if labels_or_mask is not None and labels_or_mask.dtype != torch.bool:
        mask = labels_or_mask != IGNORED
        bounds = [int(bound) for bound in labels_or_mask.masked_fill(~mask, 0).aminmax()] if mask.numel() else [0, 0]
        if bounds == [0, 1] and bool(mask.all()):
            raise ValueError(
                f"{what}: labels_or_mask must be labels, {IGNORED} where there is no loss, or bool; got integers that "
                "are all 0 or 1: pass the mask as .bool()."
            )
        if bounds[0] < 0 or bounds[1] >= vocab.vocab_size:
            raise ValueError(
                f"{what}: labels_or_mask must be tokens from 0 to {vocab.vocab_size - 1}, or {IGNORED} where there is "
                f"no loss; got {bounds[0]} to {bounds[1]}."
            )
    num_positions = math.prod(student.shape[:-1])
    if num_positions == 0 or not (mask is None or bool(mask.any())):
        raise ValueError(
            f"{what}: at least one position must have a loss; "
            f"{'labels_or_mask leaves out all' if num_positions else 'the student has'} {num_positions}."
        )
    return None if mask is None else mask.reshape(-1).to(student.device)


def _rows(values: Tensor, chosen: Tensor | None) -> Tensor:
    """Return the rows [n, ..] of the positions with a loss."""
    rows = values.reshape(-1, values.size(-1))
    return rows if chosen is None else rows[chosen]


def _rows_of_each(controls: Tensor, chosen: Tensor | None) -> Tensor:
    """Return the rows [K, n, ..] of each control at the positions with a loss."""
    rows = controls.detach().reshape(len(controls), -1, controls.size(-1))
    return rows if chosen is None else rows[:, chosen]


def _vocab(size: int, vocab_size: int | None, group: dist.ProcessGroup | None) -> VocabShard:
    padded = size * (1 if group is None else dist.get_world_size(group))
    return VocabShard.from_group(padded, padded if vocab_size is None else vocab_size, group)


def _divergence(divergence: str | Divergence) -> Divergence:
    return Divergence(divergence) if isinstance(divergence, str) else divergence


def _check_nan(what: str, loss: Tensor, chosen: Tensor | None, shape: torch.Size, check_nan: bool | None) -> None:
    """Raise ValueError that names the first position whose loss is not finite; None checks only what is on a CPU."""
    if not (loss.device.type == "cpu" if check_nan is None else check_nan):
        return
    bad = (~torch.isfinite(loss)).nonzero().flatten()
    if len(bad):
        flat = bad[0] if chosen is None else chosen.nonzero().flatten()[bad[0]]
        position = tuple(int(index) for index in torch.unravel_index(flat, shape))
        raise ValueError(
            f"{what}: every position with a loss must have a finite one; {len(bad)} of {len(loss)} have not, and the "
            f"first, at {position}, has {float(loss[bad[0]])}: logits must be finite, or -inf in student and teacher "
            "alike; leave positions out with labels_or_mask, or pass check_nan=False."
        )


def _reduced(
    loss: Tensor, chosen: Tensor | None, shape: torch.Size, reduction: str, num_items_in_batch: int | Tensor | None
) -> Tensor:
    if reduction == "sum":
        return loss.sum()
    if reduction == "mean":
        items = len(loss) if num_items_in_batch is None else num_items_in_batch
        return loss.sum() / (items.reshape(()) if isinstance(items, Tensor) else items)
    if chosen is None:
        return loss.reshape(shape)
    return loss.new_zeros(chosen.numel()).masked_scatter(chosen, loss).reshape(shape)
