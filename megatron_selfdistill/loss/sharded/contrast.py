# Copyright (c) 2026 the megatron_selfdistill authors. Apache-2.0.
"""The contrast of the teacher with controls: the same model on the same response after the hints of other problems.

    c = log mean_j softmax(c_j)          c_j: the teacher's logits of the token after the hint of another problem j
    t - c                                the information between the token and this hint, given that there is a hint

Whatever any hint makes the model do is in t and in c alike and cancels; what only this hint says remains.  A constant
per token cancels in the softmax of the target, so t need not be normalised; each c_j must be, since a mean joins them.
"""

from __future__ import annotations

import math

import torch
import torch.distributed as dist
from torch import Tensor

from megatron_selfdistill.loss.sharded.group_collectives import all_gather, group_size


def joined_log_sums(own: Tensor, group: dist.ProcessGroup | None) -> Tensor:
    """Return the log of the sum of exp(own) over the ranks, in one order on each of them.  One all-gather."""
    if group_size(group) == 1:
        return own
    parts = own.new_empty(group_size(group) * own.numel())
    all_gather(parts, own.flatten(), group)
    return parts.view(-1, *own.shape).logsumexp(0)


def row_log_sums(logits: Tensor, num_valid: int) -> Tensor:
    """Return the log of the sum of exp over the first ``num_valid`` columns of each row; -inf where there are none.

    logits: [..., V / tp], -inf where a column does not exist.  The result [...] has their dtype, at least float32.
    """
    return logits[..., :num_valid].to(torch.promote_types(logits.dtype, torch.float32)).logsumexp(-1)


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
