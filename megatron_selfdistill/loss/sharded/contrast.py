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
from typing import TYPE_CHECKING

import torch
import torch.distributed as dist
from torch import Tensor

from megatron_selfdistill.loss.sharded.group_collectives import all_gather, group_size

if TYPE_CHECKING:
    from megatron_selfdistill.loss.sharded.vocab_parallel import Backend, VocabShard


def subtract_controls(
    teacher_logits: Tensor,
    control_logits: Callable[[slice], Tensor],
    normalisers: Tensor,
    *,
    vocab: VocabShard,
    backend: Backend,
    chunk_tokens: int,
    known: bool = False,
) -> None:
    """Replace the teacher's logits t [n, V / tp] by t - c, rounded once to their dtype.

    control_logits: returns those of the K controls [K, m, V / tp] for a slice of m of the n tokens; ``chunk_tokens``
    rows of them, of all controls together, exist at a time.
    normalisers: [K, n], the `log_normalisers` of the controls; written, or where they are ``known`` read.
    Collectives: one all-gather over ``vocab.group`` per chunk, none where they are ``known``.
    """
    step = -(-chunk_tokens // len(normalisers))
    for start in range(0, len(teacher_logits), step):
        rows = slice(start, min(start + step, len(teacher_logits)))
        controls = control_logits(rows)
        if not known:
            normalisers[:, rows] = log_normalisers(controls, vocab, backend)
        teacher_logits[rows] = backend.contrast(teacher_logits[rows], controls, normalisers[:, rows])


def log_normalisers(logits: Tensor, vocab: VocabShard, backend: Backend) -> Tensor:
    """Return the log of the sum of exp(logits) over the whole vocabulary: [..., V / tp] -> [...], at least float32.

    The result is equal on all ranks of ``vocab.group``.  Collectives: one all-gather over this group.
    """
    return joined_log_sums(backend.row_log_sums(logits, vocab.num_valid), vocab.group)


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
