# Copyright (c) 2026 the megatron_selfdistill authors. Apache-2.0.
"""The elementwise terms of reverse and forward KL between student p and target q, with d = log q - log p.

They lose no digits where p and q are close; `definition` and the sharded loss sum the same terms.
"""

from __future__ import annotations

import torch
from torch import Tensor

FLOOR = -1e12
"""The number that stands for a log-probability or shifted logit of -inf: its exp is 0, and its cube is finite in
float32."""


def forward_share(target_entropy: Tensor, forward_above: float) -> Tensor:
    """Return the weight of KL(q || p) beside KL(p || q): 1 where H(q) is above ``forward_above``, else 0.

    target_entropy: H(q) in nats, any shape, which the result has, too.  NaN gives 0.
    """
    return (target_entropy > forward_above).to(target_entropy.dtype)


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


def reverse_kl_gradient(p: Tensor, d: Tensor, reverse_kl: Tensor) -> Tensor:
    """Return the gradient p (-d - KL(p || q)), given KL(p || q) of each row."""
    return (d + reverse_kl[..., None]).mul_(p).neg_()
