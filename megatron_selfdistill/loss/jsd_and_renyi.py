# Copyright (c) 2026 the megatron_selfdistill authors. Apache-2.0.
"""Values and gradients of the Jensen-Shannon divergence (JSD) and of Renyi divergences, beside those of `divergence`.

M = lam q + (1 - lam) p is the mixture of the JSD.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from megatron_selfdistill.loss.divergence import FLOOR, q_minus_p
from megatron_selfdistill.loss.target import Divergence


def log_mixture_over_p(d: Tensor, jsd_lambda: float) -> Tensor:
    """Return log(M / p) = log(lam e^d + 1 - lam), for any d."""
    return _log_mixture_over_larger(d, jsd_lambda).add_(d.clamp(min=0))


def jsd_terms(p: Tensor, q: Tensor, d: Tensor, jsd_lambda: float) -> Tensor:
    """Return lam q log(q / M) + (1 - lam) p log(p / M) >= 0, whose sum is the JSD."""
    over_larger = _log_mixture_over_larger(d, jsd_lambda)
    from_q = (d.clamp(max=0) - over_larger).mul_(q).mul_(jsd_lambda)
    return from_q.sub_((d.clamp(min=0) + over_larger).mul_(p).mul_(1 - jsd_lambda))


def _log_mixture_over_larger(d: Tensor, jsd_lambda: float) -> Tensor:
    """Return log(M / max(p, q)), finite and exact also where one of p and q is nearly 0."""
    weight_of_smaller = (d > 0).to(d.dtype).mul_(1 - 2 * jsd_lambda).add_(jsd_lambda)
    return torch.expm1(-d.abs()).mul_(weight_of_smaller).log1p_()


def jsd_gradient(p: Tensor, d: Tensor, jsd_lambda: float, kl_p_mixture: Tensor) -> Tensor:
    """Return the gradient (1 - lam) p (log(p / M) - KL(p || M)), given KL(p || M) of each row."""
    return (log_mixture_over_p(d, jsd_lambda) + kl_p_mixture[..., None]).mul_(p).mul_(jsd_lambda - 1)


NEAR = 0.5
"""The largest |log Z| of a Renyi divergence, Z = sum p^b q^(1 - b), that is computed from Z - 1."""
FAR = 1e29
"""A log Z above this number stands for infinity."""


def renyi_sums(log_p: Tensor, log_q: Tensor, divergence: Divergence) -> Tensor:
    """Return Z - 1 and log Z of the columns [..., V] of each row, Z = sum p^b q^(1 - b): [..., 2].

    log_p, log_q: normalised over all columns, -inf where a column does not exist.  Z - 1 is a sum of terms of one sign,
    which loses no digits where p and q are close; it may overflow where they are not, and log Z does not.
    Parts of a row: Z - 1 are added, and log Z by `logsumexp`.
    """
    first, other = (log_p, log_q) if divergence.kind == "reverse_kl" else (log_q, log_p)
    order, power = divergence.order, 1 - divergence.order
    no_first, no_other = torch.isneginf(first), torch.isneginf(other)
    alone = no_first | no_other
    delta = torch.where(alone, 0.0, other - first)
    height = torch.where(no_other, math.copysign(10 * FAR, order - 1), first + power * delta)
    height = torch.where(no_first, -10 * FAR, height)
    f, g, both = first.exp(), other.exp(), height.exp()
    terms = q_minus_p(f, both, power * delta) - power * q_minus_p(f, g, delta)
    terms = torch.where(alone, (both - f) - power * (g - f), terms)
    return torch.stack([terms.sum(-1), height.logsumexp(-1)], -1)


def renyi_value(small: Tensor, log_sum: Tensor, divergence: Divergence) -> Tensor:
    """Return the Renyi divergence from Z - 1 and log Z, any shape; +inf where log Z is infinite in its direction."""
    value = torch.where(log_sum.abs() < NEAR, small.log1p(), log_sum) / (divergence.order - 1)
    return value.masked_fill(log_sum.abs() > FAR, torch.inf).clamp(min=0)


def renyi_gradient(log_p: Tensor, log_q: Tensor, value: Tensor, divergence: Divergence) -> Tensor:
    """Return the gradient b / (alpha - 1) (w - p) [..., V], given the divergence of each row; NaN where it is infinite.

    With d = log q - log p, log(w / p) = (1 - b) d + (1 - alpha) D, so that w - p keeps its digits near order 1.
    """
    power, rest = divergence.student_power, 1 - divergence.order
    missing = torch.isneginf(log_p) & torch.isneginf(log_q)
    log_p, log_q = log_p.clamp(min=FLOOR), log_q.clamp(min=FLOOR)
    log_ratio = (1 - power) * (log_q - log_p) + (rest * value + (value - value))[..., None]
    p, w = log_p.exp(), (log_p + log_ratio).exp()
    return (q_minus_p(p, w, log_ratio) * (-power / rest)).masked_fill(missing, 0.0)
