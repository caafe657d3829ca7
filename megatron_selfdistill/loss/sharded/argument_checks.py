# Copyright (c) 2026 the megatron_selfdistill authors. Apache-2.0.
"""The checks of the tensors that callers give to the loss."""

from __future__ import annotations

import torch
from torch import Tensor

from megatron_selfdistill.loss.target import Target


def check_logits(caller: str, student_logits: Tensor, teacher_logits: Tensor, num_columns: int) -> None:
    """Raise ValueError unless both logits are [T, num_columns]."""
    shape = tuple(student_logits.shape)
    if len(shape) != 2 or shape[1] != num_columns or tuple(teacher_logits.shape) != shape:
        raise ValueError(
            f"{caller}: both logits must be [T, {num_columns}], the columns of this VocabShard; "
            f"got student {shape} and teacher {tuple(teacher_logits.shape)}."
        )


def check_tokens(response_tokens: Tensor, num_tokens: int) -> None:
    """Raise ValueError unless the response tokens are [num_tokens] int64."""
    if tuple(response_tokens.shape) != (num_tokens,) or response_tokens.dtype != torch.int64:
        raise ValueError(
            f"distillation_loss: response_tokens must be int64 of shape ({num_tokens},), one id per row of logits; "
            f"got {response_tokens.dtype} of shape {tuple(response_tokens.shape)}."
        )


def check_reference(
    target: Target,
    num_tokens: int,
    reference_entropy: Tensor | None,
    teacher_weights: Tensor | None = None,
    caller: str = "distillation_loss",
) -> None:
    """Raise ValueError unless the reference's entropies and the teacher's weights fit, as for `distillation_loss`."""
    _check_entropy(reference_entropy, num_tokens, target, caller)
    if teacher_weights is not None:
        _check_teacher_weights(teacher_weights, num_tokens, target)


def _check_entropy(entropy: Tensor | None, num_tokens: int, target: Target, caller: str) -> None:
    needed = target.needs_reference_entropy
    if (entropy is not None) != needed or (entropy is not None and tuple(entropy.shape) != (num_tokens,)):
        raise ValueError(
            f"{caller}: reference_entropy must be {f'[{num_tokens}]' if needed else 'None'} with rule "
            f"{target.rule}, anchor {target.anchor} and match {target.match}; "
            f"got {None if entropy is None else tuple(entropy.shape)}."
        )


def _check_teacher_weights(teacher_weights: Tensor, num_tokens: int, target: Target) -> None:
    if not target.is_anchored:
        raise ValueError(
            "distillation_loss: teacher_weights per token need a target with anchor=reference, whose mix the caller "
            "computes; got anchor=student."
        )
    if tuple(teacher_weights.shape) != (num_tokens,) or not teacher_weights.is_floating_point():
        raise ValueError(
            f"distillation_loss: teacher_weights must be floating-point numbers of shape ({num_tokens},), one per "
            f"token; got {teacher_weights.dtype} of shape {tuple(teacher_weights.shape)}."
        )
    target.with_teacher_weight(target.teacher_weight)  # refuses a number for k or k_max
