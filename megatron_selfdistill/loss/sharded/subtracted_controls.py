# Copyright (c) 2026 the megatron_selfdistill authors. Apache-2.0.
"""The teacher's logits less those of its controls, a few tokens at a time, on vocabulary shards."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from megatron_selfdistill.loss.sharded.contrast import joined_log_sums
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
    """Replace the teacher's logits by t - c, rounded once to their dtype; t: the teacher's log-probs [n, V / tp].

    t is normalised, because a constant of tens of nats would leave bf16 no digits of a difference that is small.

    control_logits: returns those of the K controls [K, m, V / tp] for a slice of m of the n tokens; ``chunk_tokens``
    rows of them, of all controls together, exist at a time.
    normalisers: [K, n], those of the controls less that of the teacher; written, or where they are ``known`` read.
    Collectives: one all-gather over ``vocab.group`` per chunk, none where they are ``known``.
    """
    step = -(-chunk_tokens // len(normalisers))
    for start in range(0, len(teacher_logits), step):
        rows = slice(start, min(start + step, len(teacher_logits)))
        controls = control_logits(rows)
        if not known:
            own = [backend.row_log_sums(logits, vocab.num_valid) for logits in (controls, teacher_logits[None, rows])]
            joined = joined_log_sums(torch.cat(own), vocab.group)
            normalisers[:, rows] = joined[:-1] - joined[-1]
        teacher_logits[rows] = backend.contrast(teacher_logits[rows], controls, normalisers[:, rows])


def log_normalisers(logits: Tensor, vocab: VocabShard, backend: Backend) -> Tensor:
    """Return the log of the sum of exp(logits) over the whole vocabulary: [..., V / tp] -> [...], at least float32.

    The result is equal on all ranks of ``vocab.group``.  Collectives: one all-gather over this group.
    """
    return joined_log_sums(backend.row_log_sums(logits, vocab.num_valid), vocab.group)
