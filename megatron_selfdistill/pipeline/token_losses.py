# Copyright (c) 2026 the megatron_selfdistill authors. Apache-2.0.
"""The loss of response tokens that a step trains on, and the results of a step."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Protocol

from torch import Tensor

from megatron_selfdistill.loss.sharded.vocab_parallel import (
    NO_OPTIONS,
    TokenOptions,
    TokenStats,
    VocabShard,
    distillation_loss,
)
from megatron_selfdistill.loss.target import Divergence, Target
from megatron_selfdistill.loss.weighting import Coefficients
from megatron_selfdistill.model.forward import Fusion
from megatron_selfdistill.model.fused_loss import FusedLoss
from megatron_selfdistill.pipeline.partial_batches import Accumulated
from megatron_selfdistill.pipeline.token_measures import TokenMeasures


class TokenLoss(Protocol):
    """The protocol of the losses of response tokens that read logits."""

    def __call__(
        self,
        student: Tensor,
        teacher: Tensor | None,
        response_tokens: Tensor,
        vocab: VocabShard,
        options: TokenOptions = NO_OPTIONS,
        /,
    ) -> TokenStats:
        """Return the statistics of R tokens, whose ``loss`` has a gradient to ``student``.

        ``student``, ``teacher``: logits [R, V / tp]; None without a teacher.  ``response_tokens``: [R] int64.
        """


TokenCoefficients = Callable[[Tensor, Tensor], Coefficients]
"""(student_log_prob [R], response_ids [R]), both on the device -> the `Coefficients` of a microbatch's tokens.

The log-probs are detached, and the coefficients carry no gradient.  loss/weighting.py has such functions.
"""


def self_distillation(
    target: Target, divergence: Divergence, backend: str | None = None, *, fusion: Fusion | None = None
) -> TokenLoss | FusedLoss:
    """Return the distillation loss with this target and divergence.

    It takes logits (vocab_parallel.py) or, with ``fusion``, hidden states (fused_linear.py).  ``backend``: as for
    `distillation_loss`.
    """
    if fusion is not None:
        return FusedLoss(target, divergence, fusion, backend)

    def loss(
        student: Tensor,
        teacher: Tensor | None,
        response_tokens: Tensor,
        vocab: VocabShard,
        options: TokenOptions = NO_OPTIONS,
    ) -> TokenStats:
        assert teacher is not None
        stats = distillation_loss(
            student,
            teacher,
            response_tokens,
            target=target,
            divergence=divergence,
            vocab=vocab,
            reference_entropy=options.reference_entropy,
            teacher_weights=options.teacher_weights,
            inplace_backward=True,
            backend=backend,
        )
        if options.observe is not None:
            options.observe(slice(0, len(response_tokens)), student, teacher, stats)
        return stats

    return loss


@dataclass
class StepOutput:
    """The results of one step on this rank, for the R response tokens that this rank's student held.

    Only the last pipeline stage has response tokens: the same on its tensor-parallel ranks, and split over its
    context-parallel ranks.
    """

    num_response_tokens: int
    """Number of response tokens of the global batch in this output's partial batches; equal on all ranks."""
    response_ids: Tensor
    """Index of each of the R tokens in ``PackedBatch.response_tokens``, [R] int64 on the device."""
    stats: TokenStats | None
    """Statistics of the R tokens, detached, the loss without coefficients; None on the other stages."""
    coefficients: Coefficients | None = None
    """Coefficients of the R tokens; None if the loss of every token is its divergence."""
    measures_teacher: bool = True
    """Whether ``stats`` describe the teacher; False on a step with a `Reference` that does not measure the teacher."""
    measures: TokenMeasures | None = None
    """Further measures of the R tokens; None without a `TokenMeasurement`, and on the other stages."""
    anchor_entropy: Tensor | None = None
    """Entropy [R] in nats of the target's anchor, student or reference, -inf where it is not measured; None if it is
    unknown."""
    accumulated: Accumulated | None = None
    """The gradients of the step up to this output; None if the output is not that of a call of the schedule."""
