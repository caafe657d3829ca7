# Copyright (c) 2026 the megatron_selfdistill authors. Apache-2.0.
"""The status of a response token: how the beta of its target came about."""

from __future__ import annotations

from enum import IntEnum

import torch
from torch import Tensor

MIN_ENTROPY = 1e-6
"""The smallest entropy, in nats, that determines a beta.  A smaller H(p) is rounding noise: this value is matched."""
MATCH_TOLERANCE = 1e-5
"""The largest |H(q) - H(p)|, in nats, at which a token counts as matched."""


class Status(IntEnum):
    """The way in which the beta of one response token came about."""

    MATCHED = 0
    """H(q) = H(p)."""
    CAPPED = 1
    """k = k_max; the k that matches the entropies is larger."""
    OUT_OF_RANGE = 2
    """The beta that matches the entropies lies outside the range of betas; beta is the nearer end of the range."""
    UNDETERMINED = 3
    """H(p) is below MIN_ENTROPY (or NaN), where almost every beta matches; beta matches MIN_ENTROPY."""
    GIVEN = 4
    """The rule gives beta and solves nothing: fixed, batch, teacher_alone."""
    UNCONVERGED = 5
    """The beta that matches the entropies lies inside the range and is not reached: |H(q) - H(p)| at the beta in use is
    above MATCH_TOLERANCE, or no bound of it is known."""


def status_given(beta: Tensor) -> Tensor:
    """Return `Status.GIVEN` for every token: int64, the shape of beta."""
    return torch.full(beta.shape, int(Status.GIVEN), dtype=torch.int64, device=beta.device)


def token_status(
    wanted_entropy: Tensor,
    target_entropy: Tensor,
    beta: Tensor,
    low: float,
    high: float,
    lowest_is_bound: bool,
    unconverged: Tensor | None = None,
) -> Tensor:
    """Return the status of tokens whose beta was solved for within [low, high]: int64, the shape of beta.

    wanted_entropy: the entropy that beta is to give to the target.
    lowest_is_bound: whether ``low`` is 1 / k_max.
    unconverged: bool, the tokens whose root lies inside the range and was not reached; None if the solver reaches every
    root.
    """
    apart = (target_entropy - wanted_entropy).abs() > MATCH_TOLERANCE
    at_low, at_high = apart & (beta <= low), apart & (beta >= high)
    status = torch.full(beta.shape, int(Status.MATCHED), dtype=torch.int64, device=beta.device)
    status.masked_fill_(at_low, int(Status.CAPPED if lowest_is_bound else Status.OUT_OF_RANGE))
    status.masked_fill_(at_high, int(Status.OUT_OF_RANGE))
    if unconverged is not None:
        status.masked_fill_(unconverged, int(Status.UNCONVERGED))
    determined = (wanted_entropy >= MIN_ENTROPY) & torch.isfinite(beta)
    return status.masked_fill_(~determined, int(Status.UNDETERMINED))
