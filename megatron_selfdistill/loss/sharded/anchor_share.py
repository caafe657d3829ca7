# Copyright (c) 2026 the megatron_selfdistill authors. Apache-2.0.
"""The reference's share of the anchor in the logits that the loss takes as the teacher's, on vocabulary shards."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from megatron_selfdistill.loss.joint_anchor import joint_anchor, shared_mix
from megatron_selfdistill.loss.sharded.vocab_parallel import VocabShard, vocab_entropy
from megatron_selfdistill.loss.target import Target


@torch.no_grad()
def share_anchor(
    student_logits: Tensor,
    teacher_logits: Tensor,
    reference_logits: Callable[[slice], Tensor],
    target: Target,
    vocab: VocabShard,
    *,
    backend: str | None,
    chunk_tokens: int,
    wants_entropy: bool,
) -> Tensor | None:
    """Replace the teacher's logits [T, V / tp] by `shared_mix`; return the anchor's entropy [T] float64, if wanted.

    reference_logits: returns those of a slice of the T tokens; ``chunk_tokens`` rows of them exist at a time.
    Collectives: those of `vocab_entropy` per chunk, none where the entropy is not wanted.
    """
    entropies = []
    for start in range(0, max(1, len(teacher_logits)), chunk_tokens):
        rows = slice(start, start + chunk_tokens)
        logits = reference_logits(rows)
        if wants_entropy:
            entropies.append(vocab_entropy(joint_anchor(student_logits[rows], logits, target), vocab, backend=backend))
        teacher_logits[rows] = shared_mix(logits, teacher_logits[rows], target)
    return torch.cat(entropies) if entropies else None
