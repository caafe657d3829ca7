# Copyright (c) 2026 the megatron_selfdistill authors. Apache-2.0.
"""The target alone, in two numbers per token, for those who sample from it."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from megatron_selfdistill.loss.sharded.shard_sums import BetaGrid
from megatron_selfdistill.loss.sharded.vocab_parallel import (
    VocabShard,
    check_reference,
    chosen,
    make_shard,
    solve_shard,
)
from megatron_selfdistill.loss.target import Target, check_arguments


@dataclass(frozen=True)
class TargetSolution:
    """The target of T tokens in two numbers per token: log q = beta m - log_normaliser, with m = w t + a.

    Both are float64 and equal on all ranks of the group.
    """

    beta: Tensor
    """[T] 1 / k; 1 under teacher_alone."""
    log_normaliser: Tensor
    """[T] log of the sum of e^(beta m), to the accuracy of the sums (float32, or float64 for float64 logits)."""


def solve_target(
    student_logits: Tensor,
    teacher_logits: Tensor,
    target: Target,
    vocab: VocabShard,
    *,
    reference_entropy: Tensor | None = None,
    backend: str | None = None,
) -> TargetSolution:
    """Return the beta of every token and its normaliser as `distillation_loss` finds them, bit for bit.

    Shapes, ranks, reference, backend, -inf and NaN: as `distillation_loss`; there is no response token, no divergence
    and no gradient.
    Collectives: three all-gathers over ``vocab.group``, two where the rule gives beta.
    Raises: ValueError if shapes do not fit, or for a backend that cannot run.
    """
    check_arguments("solve_target", locals())
    check_reference("solve_target", target, reference_entropy)
    with torch.no_grad():
        shard = make_shard(student_logits, teacher_logits, target, vocab)
        chosen_backend, grid = chosen(backend, student_logits, teacher_logits), BetaGrid.of(target, shard.dtype)
        _, results = solve_shard(
            shard, None, grid, vocab, chosen_backend, forward_kl=False, reference_entropy=reference_entropy
        )
        return TargetSolution(results.beta / grid.unit, results.log_normaliser)
