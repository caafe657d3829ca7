# Copyright (c) 2026 the megatron_selfdistill authors. Apache-2.0.
"""Factors that turn the mean over tokens into a mean over responses or over problems, and that skip first tokens."""

from __future__ import annotations

import torch
from torch import Tensor

from megatron_selfdistill.recipes.signals import Signals


def token_factors(
    signals: Signals, normalize: str, totals: tuple[float, float, float], skip_first_tokens: int = 0
) -> Tensor:
    """Return the factor [R] of each token's terms in a loss that divides by the number N of response tokens.

    ``totals``: N, the number of responses and the number of groups of the global batch.
    tokens: 1.  sequences: N / (responses * length), the mean over the tokens of each response and then over responses.
    prompts: N / groups, the sum over all tokens and the mean over problems.
    The first ``skip_first_tokens`` tokens of each response have a factor of 0; the divisors still count them.
    """
    num_tokens, num_responses, num_groups = totals
    factors = torch.ones_like(signals.sampled_log_prob)
    if normalize == "sequences":
        factors = num_tokens / num_responses / signals.per_token(signals.lengths).to(factors)
    elif normalize == "prompts":
        factors = factors * (num_tokens / num_groups)
    if skip_first_tokens:
        starts = signals.per_token(signals.lengths.cumsum(0) - signals.lengths)
        place = torch.arange(len(factors), device=factors.device) - starts
        factors = torch.where(place < skip_first_tokens, 0.0, factors)
    return factors
