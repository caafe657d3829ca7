# Copyright (c) 2026 the megatron_selfdistill authors. Apache-2.0.
"""Signals and terms of few tokens, and the numbers of one worked example that several methods share."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from megatron_selfdistill.loss.weighting import Coefficients, TruncatedImportance
from megatron_selfdistill.sources.signals import Clip, Signals, Terms
from megatron_selfdistill.sources.step_terms import RatioTerms

# One row of logits over four tokens: student, teacher, and the student that sampled token 1.
STUDENT, TEACHER, SAMPLER, TOKEN = (1.2, 0.3, -0.5, 0.0), (0.2, 1.5, -1.0, 0.4), (1.0, 0.5, -0.4, 0.1), 1
LOG_P, LOG_Q, LOG_MU = -1.536813518363, -0.523240958765, -1.315230858912
DELTA, RHO = 1.013572559598, 0.801249688551


def tensor(*values: float) -> Tensor:
    """Return the values in float64."""
    return torch.tensor(values, dtype=torch.float64)


def log_probs(logits: Sequence[float]) -> Tensor:
    """Return the log-probs of one row of logits in float64."""
    return tensor(*logits).log_softmax(0)


def signals(
    rewards: Sequence[float],
    groups: Sequence[int] | None = None,
    lengths: Sequence[int] | None = None,
    hinted: Sequence[bool] | None = None,
    privileged: Sequence[bool] | None = None,
    mu: Sequence[float] | None = None,
    p: Sequence[float] | None = None,
    q: Sequence[float] | None = None,
    episodes: Sequence[int] | None = None,
    turns: Sequence[int] | None = None,
) -> Signals:
    """Return signals in which, unless given, all responses lie in one group, have a hint, and one token."""
    counts = torch.tensor(lengths or [1] * len(rewards))
    return Signals(
        lengths=counts,
        groups=torch.tensor(groups or [0] * len(rewards)),
        rewards=tensor(*rewards),
        hinted=torch.tensor(hinted or [True] * len(rewards)),
        privileged=torch.tensor(privileged or [False] * len(rewards)),
        sampled_log_prob=torch.zeros(int(counts.sum()), dtype=torch.float64) if mu is None else tensor(*mu),
        student_log_prob=None if p is None else tensor(*p),
        target_log_prob=None if q is None else tensor(*q),
        episodes=None if episodes is None else torch.tensor(episodes),
        turns=None if turns is None else torch.tensor(turns),
    )


def coefficients(
    terms: Terms,
    mu: float = LOG_MU,
    q: float | None = LOG_Q,
    clip: Clip = Clip(0.2, 0.28),  # noqa: B008 (frozen)
    cap: float | None = None,
    p: float = LOG_P,
) -> Coefficients:
    """Return the coefficients of one token with these log-probs, of the worked example unless given."""
    target = None if q is None else tensor(q)
    correction = None if cap is None else TruncatedImportance(tensor(mu), cap)
    return RatioTerms(terms, tensor(mu), target, clip, correction=correction)(tensor(p), torch.tensor([0]))
