# Copyright (c) 2026 the megatron_selfdistill authors. Apache-2.0.
"""The divergence between student and target of a token: value and gradient, by kind.

The divergences between student p and target q are reverse KL, forward KL and the generalised Jensen-Shannon divergence
(JSD).  The sharded loss sums the same elementwise terms, which lose no digits where p and q are close.  In their names,
d = log q - log p, and M = lam q + (1 - lam) p is the mixture of the JSD.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from megatron_selfdistill.loss.target import Divergence, check_arguments, entropy

FLOOR = -1e12
"""The number that stands for a log-probability or shifted logit of -inf: its exp is 0, and its cube is finite in
float32."""


def divergence(log_p: Tensor, log_q: Tensor, divergence: Divergence) -> Tensor:
    """Return D(p, q) in nats of every row: [..., V], [..., V] -> [...].

    The result equals ``(p * (log_p - log_q)).sum(-1)`` for reverse KL, ``(q * (log_q - log_p)).sum(-1)`` for forward
    KL, and ``lam * KL(q, M) + (1 - lam) * KL(p, M)`` for the JSD.  With `Divergence.forward_above` it is reverse KL, to
    which forward KL is added for rows whose H(q) is above that number.  `Divergence.order` makes it Renyi's divergence.
    log_p, log_q: normalised, any float dtype, -inf where a column does not exist.
    Reverse KL is +inf where q is 0 and p is not, forward KL where p is 0 and q is not.
    """
    check_arguments("divergence", locals())
    if divergence.forward_above is not None:
        reverse, forward = (_kl_of_kind(log_p, log_q, kind) for kind in ("reverse_kl", "forward_kl"))
        return torch.where(forward_share(entropy(log_q), divergence.forward_above) > 0, reverse + forward, reverse)
    if divergence.is_renyi:
        return _renyi(log_p, log_q, divergence)
    if divergence.kind != "jsd":
        return _kl_of_kind(log_p, log_q, divergence.kind)
    p, q, d = probabilities_and_ratio(log_p, log_q)
    return jsd_terms(p, q, d, divergence.jsd_lambda).sum(-1)


def forward_share(target_entropy: Tensor, forward_above: float) -> Tensor:
    """Return the weight of KL(q || p) beside KL(p || q): 1 where H(q) is above ``forward_above``, else 0.

    target_entropy: H(q) in nats, any shape, which the result has, too.  NaN gives 0.
    """
    return (target_entropy > forward_above).to(target_entropy.dtype)


def _kl_of_kind(log_p: Tensor, log_q: Tensor, kind: str) -> Tensor:
    """Return KL(p || q) for "reverse_kl", KL(q || p) for "forward_kl"."""
    p, q, d = probabilities_and_ratio(log_p, log_q)
    if kind == "reverse_kl":
        value, infinite = reverse_kl_terms(p, q, d), torch.isneginf(log_q) & ~torch.isneginf(log_p)
    else:
        value, infinite = forward_kl_terms(p, q, d), torch.isneginf(log_p) & ~torch.isneginf(log_q)
    return value.sum(-1).masked_fill(infinite.any(-1), torch.inf)


def divergence_gradient(log_p: Tensor, log_q: Tensor, divergence: Divergence) -> Tensor:
    """Return dD / ds for the student's logits s of p = softmax(s), with q constant: [..., V].

        reverse KL   p ((log p - log q) - KL(p || q))
        forward KL   p - q
        JSD          (1 - lam) p (log(p / M) - KL(p || M))
        Renyi        b / (alpha - 1) (w - p),  w = p^b q^(1 - b) / sum,  b = alpha, with forward KL 1 - alpha

    With `Divergence.forward_above`, the gradient of forward KL is added to that of reverse KL where H(q) is above it.
    The gradient of a row sums to 0 over the vocabulary.  A row whose reverse KL is infinite has a gradient of inf and
    NaN.
    """
    check_arguments("divergence_gradient", locals())
    if divergence.is_renyi:
        return renyi_gradient(log_p, log_q, _renyi(log_p, log_q, divergence), divergence)
    p, q, d = probabilities_and_ratio(log_p, log_q)
    if divergence.kind == "forward_kl":
        return -q_minus_p(p, q, d)
    if divergence.kind == "jsd":
        return jsd_gradient(p, d, divergence.jsd_lambda, -(p * log_mixture_over_p(d, divergence.jsd_lambda)).sum(-1))
    infinite = (torch.isneginf(log_q) & ~torch.isneginf(log_p)).any(-1)
    gradient = reverse_kl_gradient(p, d, -(p * d).sum(-1).masked_fill(infinite, -torch.inf))
    if divergence.forward_above is None:
        return gradient
    return gradient - forward_share(entropy(log_q), divergence.forward_above)[..., None] * q_minus_p(p, q, d)


def probabilities_and_ratio(log_p: Tensor, log_q: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Return p, q and d = log q - log p, finite also where a log-probability is -inf; NaN stays NaN."""
    log_p, log_q = log_p.clamp(min=FLOOR), log_q.clamp(min=FLOOR)
    return log_p.exp(), log_q.exp(), log_q - log_p


def q_minus_p(p: Tensor, q: Tensor, d: Tensor) -> Tensor:
    """Return q - p, exact to the last digits also where q and p are close."""
    return torch.copysign(torch.expm1(-d.abs()).mul_(torch.maximum(p, q)), d)


def reverse_kl_terms(p: Tensor, q: Tensor, d: Tensor) -> Tensor:
    """Return p (e^d - 1 - d) >= 0, whose sum is KL(p || q).

    An error in the normaliser of q enters the sum squared only.
    """
    return q_minus_p(p, q, d).sub_(p * d)


def forward_kl_terms(p: Tensor, q: Tensor, d: Tensor) -> Tensor:
    """Return p (e^d (d - 1) + 1) >= 0, whose sum is KL(q || p).

    An error in the normaliser of q enters the sum squared only.
    """
    return (q * d).sub_(q_minus_p(p, q, d))


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


def reverse_kl_gradient(p: Tensor, d: Tensor, reverse_kl: Tensor) -> Tensor:
    """Return the gradient p (-d - KL(p || q)), given KL(p || q) of each row."""
    return (d + reverse_kl[..., None]).mul_(p).neg_()


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


def _renyi(log_p: Tensor, log_q: Tensor, divergence: Divergence) -> Tensor:
    """Return the Renyi divergence of every row."""
    small, log_sum = renyi_sums(log_p, log_q, divergence).unbind(-1)
    return renyi_value(small, log_sum, divergence)
