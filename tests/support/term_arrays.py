# Copyright (c) 2026 the megatron_selfdistill authors. Apache-2.0.
"""Signals and terms of few tokens, and the numbers of one worked example that several methods share."""

from __future__ import annotations

import torch
from torch import Tensor

from megatron_selfdistill.loss.weighting import Coefficients, TruncatedImportance
from megatron_selfdistill.sources.signals import Clip, Signals, Terms
from megatron_selfdistill.sources.step_terms import RatioTerms

# The student's row of logits over four tokens, of which token 1 was sampled, and log-probs of this token.
STUDENT, TOKEN = (1.2, 0.3, -0.5, 0.0), 1
LOG_P, LOG_Q, LOG_MU = -1.536813518363, -0.523240958765, -1.315230858912
CLIP = Clip(0.2, 0.28)
DELTA, RHO = 1.013572559598, 0.801249688551


def tensor(*values: float) -> Tensor:
    return torch.tensor(values, dtype=torch.float64)


def signals(
    rewards, groups=None, lengths=None, hinted=None, privileged=None, mu=None, p=None, q=None, episodes=None, turns=None
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


def coefficients(terms: Terms, mu=LOG_MU, q=LOG_Q, clip=CLIP, cap=None) -> Coefficients:
    """Return the coefficients of one token with these log-probs, of the worked example unless given."""
    target = None if q is None else tensor(q)
    correction = None if cap is None else TruncatedImportance(tensor(mu), cap)
    return RatioTerms(terms, tensor(mu), target, clip, correction=correction)(tensor(LOG_P), torch.tensor([0]))
