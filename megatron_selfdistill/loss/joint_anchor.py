# Copyright (c) 2026 the megatron_selfdistill authors. Apache-2.0.
"""The anchor of which a frozen reference has a share: a = (1 - l) s + l r, with l = `Target.reference_share`."""

from __future__ import annotations

import torch
from torch import Tensor

from megatron_selfdistill.loss.target import Target, mixed_logits


def joint_anchor(student: Tensor, reference: Tensor, target: Target) -> Tensor:
    """Return the anchor's logits a = (1 - l) s + l r, at least float32; r alone where the target is anchored to it."""
    wide = torch.promote_types(torch.promote_types(student.dtype, reference.dtype), torch.float32)
    if target.is_anchored:
        return reference.to(wide)
    share = target.reference_share
    return (student.to(wide) * (1 - share)).add_(reference, alpha=share)


def shared_mix(reference: Tensor, teacher: Tensor, target: Target) -> Tensor:
    """Return (w t + l r) / (1 - l), at least float32, to which the passes of the loss add s: m / (1 - l).

    teacher: t, or with controls t - c.
    """
    wide = torch.promote_types(torch.promote_types(teacher.dtype, reference.dtype), torch.float32)
    share = target.reference_share
    return mixed_logits(reference.to(wide) * share, teacher, target.teacher_weight, 1.0).div_(1 - share)
