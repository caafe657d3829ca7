# Copyright (c) 2026 the megatron_selfdistill authors. Apache-2.0.
"""Weights of response tokens, from the log-probs that models give the tokens themselves.

A *place* is a token with what its response has before it.  The student's responses lead to places where the target
would seldom come; what the target says there is not what the target would write.  q is the target, p the student and
mu the distribution that sampled a response y.

All log-probs are [R] nats of any float dtype, on one device.  The tokens of the responses follow each other, and
``lengths`` has the number of tokens of each response.  All weights are [R] float64, at least 0, and constants.  NaN
comes only from NaN, of which `evidence` makes a weight of 0.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

UNBOUNDED = 1e300
"""The log-ratio in place of infinity: with it, a sum over a hundred million tokens is finite, and no sum is NaN."""


def reach(
    target_log_prob: Tensor, sampled_log_prob: Tensor, lengths: Sequence[int], *, exponent: float = 1.0
) -> Tensor:
    """Return ``r_i = min(1, product over j < i of q(y_j) / mu(y_j)) ** exponent`` of each token i; r_1 is 1.

    The product says how often the target comes to the place of the token for each time that mu comes there.  Without
    the minimum and with an exponent of 1, the sum of ``r_i`` times a function of the place has, over responses of mu,
    the expectation that the sum of the function has over responses of the target.
    The sums of log-ratios are in float64.  After a token with q(y_j) = 0 the weights are 0; otherwise, after a token
    with mu(y_j) = 0, the weights are 1.  ``exponent``: above 0; a smaller one moves the weights towards 1.
    Source: the importance weight of the prefix, truncated as in Ionides 2008 (doi 10.1198/106186008X320456).
    """
    target, sampled = target_log_prob.double(), sampled_log_prob.double()
    log_ratio = torch.where(target == -torch.inf, target, target - sampled).clamp(max=UNBOUNDED)
    return (exponent * sums_before(log_ratio, lengths).clamp(max=0)).exp()


def iw_opd(target_log_prob: Tensor, student_log_prob: Tensor, lengths: Sequence[int], *, gain: float = 0.5) -> Tensor:
    """Return ``1 + gain (1 - sum over j < i of |A_j| / sum over all j of |A_j|)`` of each token i.

    A_j = log q(y_j) - log p(y_j).  The first token of a response has ``1 + gain``, and so has every token of a response
    in which all A_j are 0.  After a token that one of both excludes the weight is 1.
    Source: IW-OPD, Xie et al. 2026 (arXiv 2606.22600), algorithm 1.
    """
    target, student = target_log_prob.double(), student_log_prob.double()
    discrepancy = torch.where(target == student, 0.0, target - student).abs()
    before = sums_before(discrepancy, lengths)
    totals = [one.sum().expand(len(one)) for one in discrepancy.split(list(lengths))]
    share = before / torch.cat([before[:0], *totals]).clamp(min=torch.finfo(torch.float64).tiny)
    return 1 + gain * (1 - torch.where(before == torch.inf, 1.0, share))


def evidence(target_log_prob: Tensor, student_log_prob: Tensor, *, margin: float = 0.0) -> Tensor:
    """Return 1 for each token with ``log q(y) >= log p(y) + margin``, else 0; ``margin``: in nats.

    Source: the evidence mask of EDGE-OPD, Lazaridis et al. 2026 (arXiv 2605.23493).
    """
    return (target_log_prob.double() >= student_log_prob.double() + margin).double()


def sums_before(values: Tensor, lengths: Sequence[int]) -> Tensor:
    """Return [R]: the sum of ``values [R]`` over the earlier tokens of each token's response; 0 at its first token."""
    each = [torch.cat([one.new_zeros(1), one.cumsum(0)])[: len(one)] for one in values.split(list(lengths))]
    return torch.cat([values[:0], *each])
