# Copyright (c) 2026 the megatron_selfdistill authors. Apache-2.0.
"""The contrast of the teacher with controls: the same model on the same response after the hints of other problems.

    c = log mean_j softmax(c_j)          c_j: the teacher's logits of the token after the hint of another problem j
    t - c                                the information between the token and this hint, given that there is a hint

Whatever any hint makes the model do is in t and in c alike and cancels; what only this hint says remains.  A constant
per token cancels in the softmax of the target, so t need not be normalised; each c_j must be, since a mean joins them.
"""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
import torch.distributed as dist
from torch import Tensor

from megatron_selfdistill.loss.sharded.group_collectives import all_gather, group_size


def subtract_controls(
    teacher_logits: Tensor,
    control_logits: Callable[[slice], Tensor],
    normalisers: Tensor,
    *,
    num_valid: int,
    group: dist.ProcessGroup | None,
    chunk_tokens: int,
    known: bool = False,
) -> None:
    """Replace the teacher's logits t [n, V / tp] by t - c, rounded once to their dtype.

    control_logits: returns those of the K controls [K, m, V / tp] for a slice of m of the n tokens; ``chunk_tokens``
    rows of them, of all controls together, exist at a time.
    normalisers: [K, n], the `log_normalisers` of the controls; written, or where they are ``known`` read.
    Collectives: one all-gather over ``group`` per chunk, none where they are ``known``.
    """
    step = -(-chunk_tokens // len(normalisers))
    for start in range(0, len(teacher_logits), step):
        rows = slice(start, min(start + step, len(teacher_logits)))
        controls = control_logits(rows)
        if not known:
            normalisers[:, rows] = log_normalisers(controls, num_valid, group)
        teacher_logits[rows] = contrast(teacher_logits[rows], controls, normalisers[:, rows])


def log_normalisers(logits: Tensor, num_valid: int, group: dist.ProcessGroup | None = None) -> Tensor:
    """Return the log of the sum of exp(logits) over the whole vocabulary.

    logits: [..., V / tp], this rank's columns, of which the first ``num_valid`` exist; -inf where a column does not.
    The result [...] has the dtype of the logits, at least float32, and is equal on all ranks of ``group``.
    Collectives: one all-gather over ``group``.
    """
    wide = torch.promote_types(logits.dtype, torch.float32)
    own = logits[..., :num_valid].to(wide).logsumexp(-1)  # -inf on a shard of padding only
    if group_size(group) == 1:
        return own
    parts = own.new_empty(group_size(group) * own.numel())
    all_gather(parts, own.flatten(), group)
    return parts.view(-1, *own.shape).logsumexp(0)


def contrast(teacher_logits: Tensor, control_logits: Tensor, normalisers: Tensor) -> Tensor:
    """Return t - c of every token and column: [n, V / tp], in the dtype of the teacher's logits, at least float32.

    teacher_logits: t [n, V / tp].  control_logits: [K, n, V / tp].  normalisers: [K, n], their `log_normalisers`.
    -inf: a column with -inf in the teacher has -inf; one with -inf in all controls alone has +inf, which gives NaN to
    the loss of its token.
    """
    wide = torch.promote_types(teacher_logits.dtype, torch.float32)
    control: Tensor | None = None
    for logits, normaliser in zip(control_logits, normalisers, strict=True):
        log_probs = logits.to(wide) - normaliser.to(wide)[:, None]
        control = log_probs if control is None else torch.logaddexp(control, log_probs, out=control)
    if control is None:
        raise ValueError("contrast: control_logits must hold one control at least; got none.")
    teacher = teacher_logits.to(wide)
    difference = control.sub_(math.log(len(control_logits))).neg_().add_(teacher)
    return difference.masked_fill_(torch.isneginf(teacher), -torch.inf)
