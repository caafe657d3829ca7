# Copyright (c) 2026 the megatron_selfdistill authors. Apache-2.0.
"""Targets and divergences, random logits on full rows, and the entropy and the divergences written out."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from megatron_selfdistill.loss import Divergence, Target

TARGETS = {
    "capped": Target(anchor="student"),
    "strict": Target(k_max=None, anchor="student"),
    "k_max 2.2": Target(k_max=2.2, anchor="student"),
    "fixed": Target("fixed", k=1.3, anchor="student"),
    "batch": Target("batch", k=1.9, k_max=None, anchor="student"),
    "teacher alone": Target("teacher_alone", anchor="student"),
    "other weight": Target(teacher_weight=2.6, k_max=None, anchor="student"),
    "no teacher": Target(teacher_weight=0.0, k_max=None, anchor="student"),
}
DIVERGENCES = {"reverse": Divergence("reverse_kl"), "forward": Divergence("forward_kl"), "jsd": Divergence("jsd", 0.3)}


def entropy(log_probs: Tensor) -> Tensor:
    return -torch.where(torch.isfinite(log_probs), log_probs.exp() * log_probs, 0.0).sum(-1)


def kl(log_a: Tensor, log_b: Tensor) -> Tensor:
    return (log_a.exp() * (log_a - log_b)).sum(-1)


def divergence(log_p: Tensor, log_q: Tensor, kind: Divergence) -> Tensor:
    """Return the divergence by its definition, over the last axis; no H(q) may lie near `Divergence.forward_above`."""
    if kind.is_renyi:
        first, other = (log_p, log_q) if kind.kind == "reverse_kl" else (log_q, log_p)
        return (kind.order * first + (1 - kind.order) * other).logsumexp(-1) / (kind.order - 1)
    if kind.forward_above is not None:
        above = entropy(log_q) - kind.forward_above
        assert above.abs().min() > 1e-3, "a row lies near the threshold"
        return kl(log_p, log_q) + torch.where(above > 0, kl(log_q, log_p), 0.0)
    if kind.kind != "jsd":
        return kl(log_p, log_q) if kind.kind == "reverse_kl" else kl(log_q, log_p)
    lam = kind.jsd_lambda
    log_m = torch.logaddexp(log_q + math.log(lam), log_p + math.log(1 - lam))
    return lam * kl(log_q, log_m) + (1 - lam) * kl(log_p, log_m)


def by_bisection(
    student: Tensor, teacher: Tensor, target: Target, reference=None, controls=None, weights=None
) -> tuple[Tensor, Tensor]:
    """Return log q and beta of float64 rows, written out: q = softmax(beta m) with m = w (t - c) + a.

    A matched beta has H(q) = H(a), or the student's entropy, within a factor of 16 of the geometric mean's beta.
    ``weights``: the w of each token.
    """
    if target.rule == "teacher_alone":
        return teacher.log_softmax(-1), torch.ones_like(teacher[:, 0])
    w = torch.full_like(teacher[:, 0], target.teacher_weight) if weights is None else weights
    share = 1.0 if target.anchor == "reference" else target.reference_share
    anchor = student if share == 0 else reference if share == 1 else (1 - share) * student + share * reference
    control = torch.zeros_like(teacher)
    if controls is not None:
        control = controls.softmax(-1).mean(0).log()
        tiny = controls.log_softmax(-1).logsumexp(0) - math.log(len(controls))
        control = torch.where(torch.isneginf(control), tiny, control)  # a probability below the range of float64
    gone = torch.isneginf(teacher)
    mix = anchor + w[:, None] * (teacher - control).masked_fill(gone, 0.0)
    mix = torch.where(gone & (w[:, None] > 0), -torch.inf, mix)
    geometric = 1 + w if controls is None else torch.ones_like(w)
    if target.rule != "entropy_matched":
        beta = 1 / (geometric if target.k is None else torch.full_like(w, target.k))
        return (beta[:, None] * mix).log_softmax(-1), beta
    matched = student if target.match == "student" else anchor
    wanted = entropy(matched.log_softmax(-1)).clamp(min=1e-6)
    low, high = ((end / geometric).log() for end in (1 / 16, 16))
    for _ in range(80):
        middle = (low + high) / 2
        soft = entropy((middle.exp()[:, None] * mix).log_softmax(-1)) > wanted
        low, high = torch.where(soft, middle, low), torch.where(soft, high, middle)
    k_max = {None: math.inf, "1 + w": geometric}.get(target.k_max, target.k_max)
    beta = torch.maximum(low.exp(), torch.as_tensor(1 / k_max).to(w))
    return (beta[:, None] * mix).log_softmax(-1), beta


def with_garbage(logits: Tensor, num_columns: int) -> Tensor:
    """Return the logits with padding up to ``num_columns``, which holds garbage."""
    garbage = torch.tensor([torch.nan, torch.inf, -torch.inf, 1e30, 55.0]).repeat(num_columns)
    garbage = garbage[: num_columns - logits.size(1)].expand(len(logits), -1).to(logits)
    return torch.cat([logits, garbage], 1)


def pair(seed: int, num_rows: int = 16, vocab_size: int = 200) -> tuple[Tensor, Tensor]:
    """Return random logits of student and teacher, float64 [num_rows, vocab_size], a function of the seed."""
    generator = torch.Generator().manual_seed(seed)
    s, t = (3 * torch.randn(num_rows, vocab_size, generator=generator, dtype=torch.float64) for _ in "st")
    return s, t
