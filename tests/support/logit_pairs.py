# Copyright (c) 2026 the megatron_selfdistill authors. Apache-2.0.
"""Random logits of student and teacher on full rows, and the entropy written out."""

from __future__ import annotations

import torch
from torch import Tensor


def entropy(log_probs: Tensor) -> Tensor:
    """Return H in nats over the last axis."""
    return -torch.where(torch.isfinite(log_probs), log_probs.exp() * log_probs, 0.0).sum(-1)


def pair(seed: int, num_rows: int = 16, vocab_size: int = 200) -> tuple[Tensor, Tensor]:
    """Return random logits of student and teacher, float64 [num_rows, vocab_size], a function of the seed."""
    generator = torch.Generator().manual_seed(seed)
    s, t = (3 * torch.randn(num_rows, vocab_size, generator=generator, dtype=torch.float64) for _ in "st")
    return s, t
