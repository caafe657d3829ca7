# Copyright (c) 2026 the megatron_selfdistill authors. Apache-2.0.
"""The divergences between student p and target q: reverse KL, forward KL and the generalised Jensen-Shannon divergence.

This file works on full rows.  The sharded loss sums the same elementwise terms, which lose no digits where p and q are
close.
In the names, d = log q - log p, and M = lam q + (1 - lam) p is the mixture of the Jensen-Shannon divergence (JSD).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import accumulate

import torch
from torch import Tensor

from megatron_selfdistill.choices import DIVERGENCES

FLOOR = -1e12
"""The number that stands for a log-probability or shifted logit of -inf: its exp is 0, and its cube is finite in
float32."""


@dataclass(frozen=True)
class Divergence:
    """The divergence that pulls the student p towards the constant target q.

    kind: "reverse_kl" is KL(p || q) = KL(student || target); "forward_kl" is KL(q || p) = KL(target || student); "jsd"
    is lam KL(q || M) + (1 - lam) KL(p || M) with M = lam q + (1 - lam) p.
    jsd_lambda: lam, strictly between 0 and 1.
    """

    kind: str = "reverse_kl"
    jsd_lambda: float = 0.5

    def __post_init__(self) -> None:
        if self.kind not in DIVERGENCES:
            raise ValueError(f"Divergence.kind must be one of {', '.join(DIVERGENCES)}; got {self.kind!r}.")
        if not 0 < self.jsd_lambda < 1:
            raise ValueError(
                f"Divergence.jsd_lambda must lie strictly between 0 and 1; got {self.jsd_lambda}. "
                "Use reverse_kl or forward_kl instead of 0 or 1, at which the JSD is 0 for every p."
            )


TokenDivergences = Divergence | Sequence[tuple[int, Divergence]]
"""The divergence of all tokens; or the divergences of consecutive groups of tokens, each with its number of tokens."""


def split_divergence(divergence: Divergence, num_tokens: int, last: tuple[int, Divergence] | None) -> TokenDivergences:
    """Return the divergence of ``num_tokens`` tokens, of which ``last`` = (n, other) gives the last n another one."""
    return divergence if last is None else [(num_tokens - last[0], divergence), last]


def token_groups(divergence: TokenDivergences, num_tokens: int) -> list[tuple[slice, Divergence]]:
    """Return the consecutive slices of ``num_tokens`` tokens that have one divergence, each with its divergence.

    There is no empty slice, except for a single one without tokens.
    Raises: ValueError unless the numbers of tokens are at least 0 and add up to ``num_tokens``.
    """
    groups = [(num_tokens, divergence)] if isinstance(divergence, Divergence) else list(divergence)
    counts = [count for count, _ in groups]
    if not groups or min(counts) < 0 or sum(counts) != num_tokens:
        raise ValueError(
            f"the groups of tokens with one divergence must have {num_tokens} tokens together, got {counts}."
        )
    ends = list(accumulate(counts))
    slices = [(slice(end - count, end), kind) for end, (count, kind) in zip(ends, groups, strict=True) if count]
    return slices or [(slice(0, 0), groups[0][1])]


def divergence(log_p: Tensor, log_q: Tensor, divergence: Divergence) -> Tensor:
    """Return D(p, q) in nats of every row: [..., V], [..., V] -> [...].

    The result equals ``(p * (log_p - log_q)).sum(-1)`` for reverse KL, ``(q * (log_q - log_p)).sum(-1)`` for forward
    KL, and ``lam * KL(q, M) + (1 - lam) * KL(p, M)`` for the JSD.
    log_p, log_q: normalised, any float dtype, -inf where a column does not exist.
    Reverse KL is +inf where q is 0 and p is not, forward KL where p is 0 and q is not.
    """
    p, q, d = probabilities_and_ratio(log_p, log_q)
    if divergence.kind == "jsd":
        return jsd_terms(p, q, d, divergence.jsd_lambda).sum(-1)
    if divergence.kind == "reverse_kl":
        value, infinite = reverse_kl_terms(p, q, d), torch.isneginf(log_q) & ~torch.isneginf(log_p)
    else:
        value, infinite = forward_kl_terms(p, q, d), torch.isneginf(log_p) & ~torch.isneginf(log_q)
    return value.sum(-1).masked_fill(infinite.any(-1), torch.inf)


def divergence_gradient(log_p: Tensor, log_q: Tensor, divergence: Divergence) -> Tensor:
    """Return dD / ds for the student's logits s of p = softmax(s), with q constant: [..., V].

        reverse KL   p ((log p - log q) - KL(p || q))
        forward KL   p - q
        JSD          (1 - lam) p (log(p / M) - KL(p || M))

    The gradient of a row sums to 0 over the vocabulary.  A row whose reverse KL is infinite has a gradient of inf and
    NaN.
    """
    p, q, d = probabilities_and_ratio(log_p, log_q)
    if divergence.kind == "forward_kl":
        return -q_minus_p(p, q, d)
    if divergence.kind == "jsd":
        return jsd_gradient(p, d, divergence.jsd_lambda, -(p * log_mixture_over_p(d, divergence.jsd_lambda)).sum(-1))
    infinite = (torch.isneginf(log_q) & ~torch.isneginf(log_p)).any(-1)
    return reverse_kl_gradient(p, d, -(p * d).sum(-1).masked_fill(infinite, -torch.inf))


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
