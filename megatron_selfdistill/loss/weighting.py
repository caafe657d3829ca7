# Copyright (c) 2026 the megatron_selfdistill authors. Apache-2.0.
"""Weights of response tokens in the loss, from what is known about them."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class TruncatedImportance:
    """``min(p / mu, cap)`` per token: p the student's probability of the token at temperature 1, mu that under the
    distribution which it was drawn from.

    mu differs from p where another engine sampled with other kernels, where a temperature or a cut changed the
    distribution, and where the response was guided.  The weight is a constant: no gradient flows through it.
    Source: truncated importance sampling, Ionides 2008 (doi 10.1198/106186008X320456); per token, as in Espeholt et al.
    2018 (arXiv 1802.01561), equation 1.
    """

    sampled_log_probs: Tensor
    """[R_total] nats: log mu of every response token of this replica, in the order of
    ``PackedBatch.response_tokens``."""
    cap: float = 2.0

    def __call__(self, student_log_prob: Tensor, response_ids: Tensor) -> Tensor:
        """Weights [R] of the rows that predict ``response_ids`` [R], whose log p is ``student_log_prob`` [R]."""
        sampled = self.sampled_log_probs[response_ids.to(self.sampled_log_probs.device)].to(student_log_prob)
        with torch.no_grad():
            return (student_log_prob - sampled).exp().clamp(max=self.cap)
