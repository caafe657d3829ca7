# Copyright (c) 2026 the megatron_selfdistill authors. Apache-2.0.
"""The losses of response tokens that a step trains on: self-distillation, or the next token for the baselines."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, fields

import torch
from torch import Tensor

from megatron_selfdistill.compat import repairs  # noqa: F401  isort: skip  (must come before megatron.core)
from megatron.core.tensor_parallel import vocab_parallel_cross_entropy

from megatron_selfdistill.loss.divergence import Divergence, split_divergence
from megatron_selfdistill.loss.sharded.vocab_parallel import Observer, TokenStats, VocabShard, distillation_loss
from megatron_selfdistill.loss.target import Target
from megatron_selfdistill.loss.weighting import Coefficients
from megatron_selfdistill.model.output_layer import FusedLoss, Fusion
from megatron_selfdistill.pipeline.device_batch import StudentMicrobatch

TokenLoss = Callable[..., TokenStats]
"""(student_logits [R, V/tp], teacher_logits or None, response_tokens [R], vocab) -> TokenStats with a gradient.

With a reference whose entropy the target matches, the loss also takes ``reference_entropy [R]``; with `GuidedTokens`
``teacher_weights [R]`` and ``guided`` = (n, the divergence of the last n tokens); with a `TokenMeasurement`
``observe``, the `Observer` of the logits.
"""
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

        The result is None where all tokens have the w of the target.
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

    def loss(
        student: Tensor,
        teacher: Tensor | None,
        response_tokens: Tensor,
        vocab: VocabShard,
        reference_entropy: Tensor | None = None,
        teacher_weights: Tensor | None = None,
        guided: tuple[int, Divergence] | None = None,
        observe: Observer | None = None,
    ) -> TokenStats:
        assert teacher is not None
        stats = distillation_loss(
            student,
            teacher,
            response_tokens,
            target=target,
            divergence=split_divergence(divergence, len(response_tokens), guided),
            vocab=vocab,
            reference_entropy=reference_entropy,
            teacher_weights=teacher_weights,
            inplace_backward=True,
            backend=backend,
        )
        if observe is not None:
            observe(slice(0, len(response_tokens)), student, teacher, stats)
        return stats

    return loss


def next_token(student: Tensor, teacher: Tensor | None, response_tokens: Tensor, vocab: VocabShard) -> TokenStats:
    """Return -log p(response token) over the valid vocabulary, in nats, by Megatron's vocab-parallel cross entropy.

    ``loss`` and ``student_log_prob``, the same number with the other sign, are differentiable.
    The function overwrites ``student``: the padding becomes -inf, and in float32 the logits become the softmax and then
    the gradient.  In bf16 the softmax and the gradient take the place of a float32 copy
    (`output_layer.next_token_copies`).
    """
    with torch.no_grad():
        student[:, vocab.num_valid :] = float("-inf")
    loss = vocab_parallel_cross_entropy(student.float().unsqueeze(1), response_tokens.unsqueeze(1)).squeeze(1)
    unknown = torch.full_like(loss.detach(), float("nan"))
    values = {f.name: unknown for f in fields(TokenStats)}
    values |= {"loss": loss, "student_log_prob": -loss, "status": torch.zeros_like(response_tokens)}
    values |= {"grid_betas": unknown[:0], "grid_entropies": unknown.new_empty(len(loss), 0)}
    return TokenStats(**values)
