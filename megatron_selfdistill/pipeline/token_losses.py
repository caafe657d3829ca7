# Copyright (c) 2026 the megatron_selfdistill authors. Apache-2.0.
"""The losses of response tokens that a step trains on, and the results of a step.

A loss is that of self-distillation, or of the next token for the baselines.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, fields
from typing import Protocol

import torch
from torch import Tensor

from megatron_selfdistill.compat import repairs  # noqa: F401  isort: skip  (must come before megatron.core)
from megatron.core.tensor_parallel import vocab_parallel_cross_entropy

from megatron_selfdistill.loss.sharded.vocab_parallel import (
    NO_OPTIONS,
    TokenOptions,
    TokenStats,
    VocabShard,
    distillation_loss,
)
from megatron_selfdistill.loss.target import Divergence, Target, split_divergence
from megatron_selfdistill.loss.weighting import Coefficients
from megatron_selfdistill.model.forward import Fusion
from megatron_selfdistill.model.fused_loss import FusedLoss
from megatron_selfdistill.pipeline.batch import StudentMicrobatch
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
        ...


TokenCoefficients = Callable[[Tensor, Tensor], Coefficients]
"""(student_log_prob [R], response_ids [R]), both on the device -> the `Coefficients` of a microbatch's tokens.

The log-probs are detached, and the coefficients carry no gradient.

loss/weighting.py has such functions.
"""


@dataclass(frozen=True)
class GuidedTokens:
    """The teacher's weight and the divergence of the tokens of guided problems, where they have their own."""

    teacher_weight: float | None = None
    """w of these tokens, which needs a target that is anchored to a reference; None is the w of the target."""
    divergence: Divergence | None = None
    """The divergence of these tokens; None is the divergence of the loss."""

    def weights(self, microbatch: StudentMicrobatch, teacher_weight: float) -> Tensor | None:
        """Return w [R] float64 of a microbatch's tokens, of which the plain tokens have ``teacher_weight``.

        The result is None if all tokens have the w of the target.
        """
        if self.teacher_weight is None:
            return None
        num_plain = len(microbatch.response_tokens) - microbatch.num_guided
        weights = torch.full_like(microbatch.response_tokens, self.teacher_weight, dtype=torch.float64)
        weights[:num_plain] = teacher_weight
        return weights


def self_distillation(
    target: Target,
    divergence: Divergence,
    backend: str | None = None,
    *,
    fusion: Fusion | None = None,
) -> TokenLoss | FusedLoss:
    """Return the distillation loss with this target and divergence.

    It takes logits (vocab_parallel.py) or, with ``fusion``, hidden states (fused_linear.py).  ``backend``: as for
    `distillation_loss`.
    """
    if fusion is not None:
        return FusedLoss(target, divergence, fusion, backend)
    return self_distillation_of_logits(target, divergence, backend)


def self_distillation_of_logits(target: Target, divergence: Divergence, backend: str | None) -> TokenLoss:
    """Return the distillation loss that takes logits; the arguments are those of `self_distillation`."""

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
            divergence=split_divergence(divergence, len(response_tokens), options.guided),
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


def next_token(
    student: Tensor,
    teacher: Tensor | None,
    response_tokens: Tensor,
    vocab: VocabShard,
    options: TokenOptions = NO_OPTIONS,
) -> TokenStats:
    """Return -log p(response token) over the valid vocabulary, in nats, by Megatron's vocab-parallel cross entropy.

    ``loss`` and ``student_log_prob``, the same number with the other sign, are differentiable.
    The function overwrites ``student``: the padding becomes -inf, and in float32 the logits become the softmax and then
    the gradient.  In bf16 the softmax and the gradient take the place of a float32 copy
    (`model.forward.next_token_copies`).
    """
    with torch.no_grad():
        student[:, vocab.num_valid :] = float("-inf")
    loss = vocab_parallel_cross_entropy(student.float().unsqueeze(1), response_tokens.unsqueeze(1)).squeeze(1)
    unknown = torch.full_like(loss.detach(), float("nan"))
    values = {f.name: unknown for f in fields(TokenStats)}
    values |= {"loss": loss, "student_log_prob": -loss, "status": torch.zeros_like(response_tokens)}
    values |= {"grid_betas": unknown[:0], "grid_entropies": unknown.new_empty(len(loss), 0)}
    return TokenStats(**values)


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
    """Entropy [R] in nats of the target's anchor, student or reference; None if it is unknown."""
    accumulated: Accumulated | None = None
    """The gradients of the step up to this output; None if the output is not that of a call of the schedule."""

    @classmethod
    def joined(cls, parts: Sequence[StepOutput], lengths: Sequence[int]) -> StepOutput:
        """Return the results of all ``parts``, the partial batches of a step, as those of one batch, in order.

        ``lengths``: the number of response tokens of this replica in each partial batch, by which ``response_ids``
        count on.
        """
        if len(parts) == 1:
            return parts[0]
        starts = [sum(lengths[:i]) for i in range(len(parts))]
        stats = [part.stats for part in parts if part.stats is not None]
        coefficients = [part.coefficients for part in parts if part.coefficients is not None]
        measures = [part.measures for part in parts if part.measures is not None]
        entropies = [part.anchor_entropy for part in parts if part.anchor_entropy is not None]
        return cls(
            num_response_tokens=sum(part.num_response_tokens for part in parts),
            response_ids=torch.cat([part.response_ids + start for part, start in zip(parts, starts, strict=True)]),
            stats=TokenStats.concatenate(stats) if stats else None,
            coefficients=Coefficients.concatenate(coefficients) if coefficients else None,
            measures_teacher=all(part.measures_teacher for part in parts),
            measures=TokenMeasures.concatenate(measures) if measures else None,
            anchor_entropy=torch.cat(entropies) if entropies else None,
            accumulated=parts[-1].accumulated,
        )
