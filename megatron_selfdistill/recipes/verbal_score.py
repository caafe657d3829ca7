# Copyright (c) 2026 the megatron_selfdistill authors. Apache-2.0.
"""The verbal score of OVD: the digit with which a teacher answers the question how good a response is.

OVD (arXiv 2601.21968) samples one digit from 0 to 9.  Here the score is the mean of the digit,

    S = sum_d d P(d),    P(d) = p(d) / sum_e p(e)

with the probabilities p of the ten digits as the first token of the answer.  S has no sampling noise.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

DIGITS = "0123456789"
QUESTION = (
    "{problem}\n\nHere is the solution to this problem:\n\n{solution}\n\nHere is a response to it:\n\n{response}\n\n"
    "How good is the response, from 0 (useless) to 9 (flawless)? Answer with one digit."
)
"""The wording of the question where ``verbal.template`` is null."""
LARGEST = 9.0
"""The largest score."""


def verbal_scores(log_probs: Tensor) -> Tensor:
    """Return S [B] float64 of the log-probs of the digits 0 to 9, ``[B, 10]``."""
    shares = log_probs.double().softmax(-1)
    return shares @ torch.arange(len(DIGITS), dtype=torch.float64, device=shares.device)


def auroc(scores: Sequence[float], right: Sequence[bool]) -> float | None:
    """Return the share of (right, wrong) pairs in which the right response has the larger score; equal scores are half.

    The result is None without right or without wrong responses.  It is the same for S and for log S.
    """
    of = torch.tensor(scores, dtype=torch.float64)
    is_right = torch.tensor(right, dtype=torch.bool)
    differences = of[is_right][:, None] - of[~is_right][None, :]
    if differences.numel() == 0:
        return None
    return float(((differences > 0).double() + 0.5 * (differences == 0).double()).mean())
