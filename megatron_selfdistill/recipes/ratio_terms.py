# Copyright (c) 2026 the megatron_selfdistill authors. Apache-2.0.
"""The coefficients of a step's loss from the terms of a rule and the student's log-probs of the forward pass itself."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from megatron_selfdistill.loss.weighting import Coefficients
from megatron_selfdistill.recipes.advantages import clipped_policy
from megatron_selfdistill.recipes.signals import Terms


@dataclass(frozen=True)
class RatioTerms:
    """The coefficients of a replica's response tokens: `Terms` with the ratio rho = p / mu of the training pass."""

    terms: Terms
    """The terms of the rule, [R_total] each, on the device of the logits."""
    sampled_log_prob: Tensor
    """log mu of each token, [R_total] float64 nats, on the same device."""
    target_log_prob: Tensor | None
    """log q of each token, [R_total] float64 nats; None where ``terms.sampled_kl`` is 0 everywhere."""
    clip_low: float | None
    clip_high: float | None
    ratio_cap: float | None = None
    """The bounds of `clipped_policy`, for the advantage alone."""
    correction: Callable[[Tensor, Tensor], Coefficients] | None = None
    """Importance weights that multiply the divergence, as in `TruncatedImportance`; None multiplies it by nothing."""
    likelihood_floor: Tensor | None = None
    """The log p below which each token has no likelihood term, [R_total] float64; None is minus infinity."""
    has_policy_term: bool = True
    """Whether any token may have a coefficient of -log p; without it the loss has the divergence alone."""

    def __call__(self, student_log_prob: Tensor, response_ids: Tensor) -> Coefficients:
        """Return the coefficients of the tokens ``response_ids [r]``, in the dtype of ``student_log_prob [r]``."""
        with torch.no_grad():
            log_prob = student_log_prob.double()
            log_ratio = log_prob - self.sampled_log_prob[response_ids]
            divergence = self.terms.divergence[response_ids]
            if self.correction is not None:
                divergence = divergence * self.correction(log_prob, response_ids).divergence
            if not self.has_policy_term:
                return Coefficients(divergence.to(student_log_prob))
            policy, clipped = clipped_policy(
                self.terms.advantage[response_ids], log_ratio, self.clip_low, self.clip_high, self.ratio_cap
            )
            if self.target_log_prob is not None:
                weight = self.terms.sampled_kl[response_ids] * log_ratio.exp()
                towards = self.target_log_prob[response_ids] - log_prob
                policy = policy + torch.where(weight == 0, 0.0, weight * towards)
            likelihood = self.terms.likelihood[response_ids]
            if self.likelihood_floor is not None:
                likelihood = torch.where(log_prob < self.likelihood_floor[response_ids], 0.0, likelihood)
            policy = policy + likelihood
            return Coefficients(divergence.to(student_log_prob), policy.to(student_log_prob), clipped)
