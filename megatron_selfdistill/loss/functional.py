# Copyright (c) 2026 the megatron_selfdistill authors. Apache-2.0.
"""The loss in one call, for a trainer of your own: logits or hidden states of whole batches, a mask, and a reduction.

`self_distillation_loss` takes logits of any leading shape, and `linear_self_distillation_loss` the hidden states and
the weight of the output layer, whose logits it makes for a few tokens at a time.  Both are `distillation_loss` and
`fused_distillation_loss` with the conventions of trainers; the numbers are the same.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import ParamSpec

import torch
import torch.distributed as dist
from torch import Tensor

from megatron_selfdistill.loss.sharded.fused_linear import fused_distillation_loss
from megatron_selfdistill.loss.sharded.vocab_parallel import VocabShard, distillation_loss, vocab_entropy
from megatron_selfdistill.loss.target import Divergence, Target, mixed_logits

IGNORED = -100
"""The label of a position without a loss, as in ``torch.nn.functional.cross_entropy``."""
REDUCTIONS = ("mean", "sum", "none")

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
    reference_logits: those of the frozen start on the student's context, given if and only if the target is anchored to
    a reference, as `Target()` is; ``Target(anchor="student")`` mixes with the student itself.
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
    NaN: a position with NaN or +inf in its logits has a loss of NaN.  check_nan: whether that is an error, for which
    the host must read the losses; None: only on a CPU, where this costs no wait.
    Memory: [n, V] for the gradient; with a reference [n, V] for the mix, at least float32, until backward; copies of
    the rows with a loss where a mask leaves some out.
    torch.compile: the loss runs uncompiled and breaks the graph, which ``fullgraph=True`` refuses.  torch.func: its
    transforms raise RuntimeError.  Second derivatives: none, since the gradient is a constant for autograd.  Autocast
    changes nothing inside.
    Raises: ValueError for shapes or vocabularies that disagree, labels that are a mask of integers, a mask without any
    position, a reduction that does not exist, a reference that is missing or not asked for, and NaN as above.
    """
    target = Target() if target is None else target
    named = {"teacher_logits": teacher_logits, "reference_logits": reference_logits}
    _check("self_distillation_loss", "student_logits", student_logits, named, target, reduction, num_items_in_batch)
    chosen = _chosen("self_distillation_loss", student_logits.shape[:-1], labels_or_mask, student_logits.device)
    student, teacher = (_rows(logits, chosen) for logits in (student_logits, teacher_logits))
    vocab = _vocab(student.size(-1), vocab_size, process_group)
    entropy = None
    if reference_logits is not None:
        reference, weight = _rows(reference_logits, chosen), target.teacher_weight
        with torch.no_grad():
            entropy = vocab_entropy(reference, vocab) if target.needs_reference_entropy else None
            wide = torch.promote_types(torch.promote_types(reference.dtype, teacher.dtype), torch.float32)
            mix = mixed_logits(reference.to(wide), teacher, weight, 1.0)
            teacher = mix.div_(1 + weight) if weight else mix  # with weight 0 the mix may be the caller's tensor
    stats = distillation_loss(
        student,
        teacher.detach(),
        torch.zeros(len(student), dtype=torch.int64, device=student.device),
        target=target,
        divergence=_divergence(divergence),
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
    Everything else: as `self_distillation_loss`, on one rank.
    """
    target = Target() if target is None else target
    named = {"teacher_hidden": teacher_hidden, "reference_hidden": reference_hidden}
    what = "linear_self_distillation_loss"
    _check(what, "student_hidden", student_hidden, named, target, reduction, num_items_in_batch)
    chosen = _chosen(what, student_hidden.shape[:-1], labels_or_mask, student_hidden.device)
    student, teacher = _rows(student_hidden, chosen), _rows(teacher_hidden, chosen).detach()
    vocab = _vocab(len(student_weight), vocab_size, None)
    theirs = student_weight.detach() if teacher_weight is None else teacher_weight.detach()
    _check_weights(student_weight, {"teacher_weight": teacher_weight, "reference_weight": reference_weight})
    entropy, reference = None, None
    if reference_hidden is None and reference_weight is not None:
        raise ValueError(f"{what}: reference_weight needs reference_hidden; got the weight alone.")
    if reference_hidden is not None:
        own = student_weight.detach() if reference_weight is None else reference_weight.detach()
        reference = _rows(reference_hidden, chosen).detach(), own
        if target.needs_reference_entropy:
            with torch.no_grad():
                parts = [vocab_entropy(part @ own.t(), vocab) for part in reference[0].split(chunk_tokens)]
                entropy = torch.cat(parts)
    stats = fused_distillation_loss(
        student,
        teacher,
        student_weight,
        theirs,
        torch.zeros(len(student), dtype=torch.int64, device=student.device),
        target=target,
        divergence=_divergence(divergence),
        vocab=vocab,
        reference_entropy=entropy,
        reference=reference,
        chunk_tokens=chunk_tokens,
        mode=mode,
    )
    _check_nan(what, stats.loss, chosen, student_hidden.shape[:-1], check_nan)
    return _reduced(stats.loss, chosen, student_hidden.shape[:-1], reduction, num_items_in_batch)


def _check(
    what: str,
    own_name: str,
    own: Tensor,
    others: dict[str, Tensor | None],
    target: Target,
    reduction: str,
    num_items_in_batch: int | Tensor | None,
) -> None:
    """Raise ValueError for tensors that do not belong together, and for a reduction that does not exist."""
    reference_name, reference = list(others.items())[-1]
    if target.is_anchored != (reference is not None):
        raise ValueError(
            f"{what}: {reference_name} must be given if and only if the target is anchored to a reference, as Target() "
            f'is; got {"none" if reference is None else "one"} with {target}; Target(anchor="student") needs none.'
        )
    if target.rule == "batch" and target.k is None:
        raise ValueError(f"{what}: the rule batch solves one k for a whole step: give k (`solve_batch_k`); got None.")
    for name, tensor in {own_name: own, **others}.items():
        if hasattr(tensor, "to_local"):
            raise ValueError(f"{what}: {name} must be this rank's part; got a DTensor: pass its to_local().")
    for name, other in others.items():
        if other is not None and own_name.endswith("logits") and other.shape[-1:] != own.shape[-1:]:
            raise ValueError(
                f"{what}: {name} must have the vocabulary of {own_name}, one column for each of the same tokens; "
                f"got {other.size(-1)} and {own.size(-1)} columns."
            )
        if other is not None and other.shape != own.shape:
            raise ValueError(
                f"{what}: {name} must have the shape of {own_name}, row by row for the same tokens of the response; "
                f"got {tuple(other.shape)} and {tuple(own.shape)}."
            )
    if reduction not in REDUCTIONS:
        raise ValueError(f"{what}: reduction must be one of {', '.join(REDUCTIONS)}; got {reduction!r}.")
    if num_items_in_batch is not None and reduction != "mean":
        raise ValueError(f"{what}: num_items_in_batch divides a mean; got it with reduction={reduction!r}.")


def _check_weights(student_weight: Tensor, others: dict[str, Tensor | None]) -> None:
    for name, other in others.items():
        if other is not None and other.shape != student_weight.shape:
            raise ValueError(
                f"linear_self_distillation_loss: {name} must have the shape of student_weight, one row for each of the "
                f"same tokens; got {tuple(other.shape)} and {tuple(student_weight.shape)}."
            )


def _chosen(what: str, shape: torch.Size, labels_or_mask: Tensor | None, device: torch.device) -> Tensor | None:
    """Return which positions have a loss, [n] bool; None for all of them."""
    if labels_or_mask is None:
        return None
    if labels_or_mask.shape != shape:
        raise ValueError(
            f"{what}: labels_or_mask must have one entry per position, {tuple(shape)}; "
            f"got {tuple(labels_or_mask.shape)}."
        )
    if labels_or_mask.is_floating_point():
        raise ValueError(f"{what}: labels_or_mask must be integer labels or bool; got {labels_or_mask.dtype}.")
    mask = labels_or_mask if labels_or_mask.dtype == torch.bool else labels_or_mask != IGNORED
    if mask is not labels_or_mask and [int(bound) for bound in labels_or_mask.aminmax()] == [0, 1]:
        raise ValueError(
            f"{what}: labels_or_mask must be labels, {IGNORED} where there is no loss, or bool; got integers that are "
            "all 0 or 1: pass the mask as .bool()."
        )
    if not bool(mask.any()):
        raise ValueError(
            f"{what}: at least one position must have a loss; labels_or_mask leaves out all {mask.numel()}."
        )
    return mask.reshape(-1).to(device)


def _rows(values: Tensor, chosen: Tensor | None) -> Tensor:
    """Return the rows [n, ..] of the positions with a loss."""
    rows = values.reshape(-1, values.size(-1))
    return rows if chosen is None else rows[chosen]


def _vocab(size: int, vocab_size: int | None, group: dist.ProcessGroup | None) -> VocabShard:
    padded = size * (1 if group is None else dist.get_world_size(group))
    return VocabShard.from_group(padded, padded if vocab_size is None else vocab_size, group)


def _divergence(divergence: str | Divergence) -> Divergence:
    return divergence if isinstance(divergence, Divergence) else Divergence(divergence)


def _check_nan(what: str, loss: Tensor, chosen: Tensor | None, shape: torch.Size, check_nan: bool | None) -> None:
    """Raise ValueError that names the first position whose loss is NaN; None checks only what lies on a CPU."""
    if not (loss.device.type == "cpu" if check_nan is None else check_nan):
        return
    bad = torch.isnan(loss).nonzero().flatten()
    if len(bad):
        flat = bad[0] if chosen is None else chosen.nonzero().flatten()[bad[0]]
        position = tuple(int(index) for index in torch.unravel_index(flat, shape))
        raise ValueError(
            f"{what}: the logits must be finite or -inf at every position with a loss; {len(bad)} of {len(loss)} have "
            f"a loss of NaN, the first at {position}: leave them out with labels_or_mask, or pass check_nan=False."
        )


def _reduced(
    loss: Tensor, chosen: Tensor | None, shape: torch.Size, reduction: str, num_items_in_batch: int | Tensor | None
) -> Tensor:
    if reduction == "sum":
        return loss.sum()
    if reduction == "mean":
        return loss.sum() / (len(loss) if num_items_in_batch is None else num_items_in_batch)
    if chosen is None:
        return loss.reshape(shape)
    return loss.new_zeros(chosen.numel()).masked_scatter(chosen, loss).reshape(shape)
