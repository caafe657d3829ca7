# Copyright (c) 2026 the megatron_selfdistill authors. Apache-2.0.
"""Coefficients of the two terms of a token's loss, w D(p, q) - a log p(token)."""

from __future__ import annotations

import zlib
from collections.abc import Iterable
from dataclasses import dataclass

import torch
from torch import Tensor

from megatron_selfdistill.data.contexts import ContextPair
from megatron_selfdistill.loss.weighting import Coefficients


@dataclass(frozen=True)
class GivenCoefficients:
    """Token coefficients w and a times min(p / mu, 2), where a clip sets a to 0 at the ratios above 2.

    All are [R_total], in the order of ``PackedBatch.response_tokens``.
    """

    w: Tensor
    a: Tensor
    log_mu: Tensor

    @classmethod
    def of(cls, contexts: Iterable[ContextPair]) -> GivenCoefficients:
        """Return coefficients that depend on the problem and on the place in the response, and on no layout."""
        parts = []
        for context in contexts:
            generator = torch.Generator().manual_seed(zlib.crc32(context.problem_id.encode()))
            random = torch.rand(3, len(context.response), generator=generator, dtype=torch.float64)
            parts.append(torch.stack([2 * random[0], 4 * random[1] - 2, -3 - 3 * random[2]]))
            parts[-1][0, 1::4], parts[-1][1, 2::5] = 0.0, 0.0
        return cls(*torch.cat(parts, 1)) if parts else cls(*torch.zeros(3, 0, dtype=torch.float64))

    def __call__(self, student_log_prob: Tensor, response_ids: Tensor) -> Coefficients:
        """Return the coefficients of some of the tokens."""
        assert not student_log_prob.requires_grad
        ratio = (student_log_prob.double() - self.log_mu[response_ids]).exp()
        clipped = ratio > 2
        policy = torch.where(clipped, 0.0, self.a[response_ids] * ratio)
        return Coefficients(self.w[response_ids].to(student_log_prob), policy.to(student_log_prob), clipped)
