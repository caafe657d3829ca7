# Copyright (c) 2026 the megatron_selfdistill authors. Apache-2.0.
"""Logits whose H(beta) has a plateau between two slopes, and a reference in float64 by bisection."""

from __future__ import annotations

import distributions as tool
import torch
from logit_pairs import DIVERGENCES as DIVERGENCES
from logit_pairs import divergence, entropy, kl
from torch import Tensor

from megatron_selfdistill.loss import Divergence, Status, Target, TokenStats

CLASSES = [name for name in tool.DISTRIBUTIONS if any(word in name for word in ("tied", "forks", "levels"))]
TARGETS = {"capped": Target(anchor="student"), "strict": Target(k_max=None, anchor="student")}


def draw(name: str, num_rows: int = 8, num_columns: int = 300) -> tuple[Tensor, Tensor, Tensor]:
    student, teacher = tool.draw(name, num_rows, num_columns, 3)
    return student, teacher, torch.arange(num_rows) % 5


def needing_the_third_pass(num_columns: int = 320) -> tuple[Tensor, Tensor, Tensor]:
    """Return four rows of which the second pass leaves the first and the third 1e-4 nats off."""
    student, teacher = torch.zeros(4, num_columns), torch.zeros(4, num_columns)
    student[::2, 0], student[::2, 1], teacher[::2, :2] = 13.875, 13.625, 7.5
    ramp = torch.linspace(0, 9, num_columns)
    student[1::2], teacher[1::2] = ramp, ramp.flip(0) + torch.tensor([[0.0], [3.0]]) * ramp
    return student, teacher, torch.tensor([0, 1, 1, 300])


def root(student: Tensor, teacher: Tensor, target: Target) -> Tensor:
    """Return the beta [T] with H(softmax(beta m)) = H(p) in float64; NaN where none lies within the range of betas."""
    s, t = student.double(), teacher.double()
    mix, wanted = target.teacher_weight * t + s, entropy(s.log_softmax(-1))
    lowest = 1 / target.k_bound if target.k_bound else 1 / 16 / target.geometric_k
    low, high = (torch.full_like(wanted, end).log() for end in (lowest, 16 / target.geometric_k))

    def excess(log_beta: Tensor) -> Tensor:
        return entropy((log_beta.exp()[:, None] * mix).log_softmax(-1)) - wanted

    has_root = (excess(low) > 1e-5) & (excess(high) < -1e-5)  # closer to an end than rounding, either answer is right
    for _ in range(60):
        middle = (low + high) / 2
        soft = excess(middle) > 0
        low, high = torch.where(soft, middle, low), torch.where(soft, high, middle)
    return torch.where(has_root & (wanted > 1e-6), low.exp(), torch.nan)


def at_beta(student: Tensor, teacher: Tensor, beta: Tensor, target: Target, kind: Divergence) -> tuple[Tensor, ...]:
    """Return the loss, its gradient, H(q), KL(p || q) and log q in float64, for the target at this beta."""
    s = student.double().detach().requires_grad_()
    mix = target.teacher_weight * teacher.double() + s.detach()
    log_p, log_q = s.log_softmax(-1), (beta.double()[:, None] * mix).log_softmax(-1)
    reverse, loss = kl(log_p, log_q), divergence(log_p, log_q, kind)
    (gradient,) = torch.autograd.grad(loss.sum(), s)
    return loss.detach(), gradient, entropy(log_q), reverse.detach(), log_q


def assert_solved(
    stats: TokenStats, gradient: Tensor, rows: tuple[Tensor, Tensor, Tensor], target: Target, kind: Divergence
) -> None:
    """Assert that each row with a root is matched there, and that all numbers belong to the beta in use."""
    student, teacher, tokens = rows
    has_root = ~torch.isnan(root(student, teacher, target))
    assert has_root.any() and (stats.status[has_root] == Status.MATCHED).all()
    assert (stats.status != Status.UNCONVERGED).all()
    loss, exact, target_entropy, reverse, log_q = at_beta(student, teacher, stats.beta, target, kind)
    mismatch = target_entropy - entropy(student.double().log_softmax(-1))
    assert mismatch[has_root].abs().max() <= 1e-5
    scale = (stats.beta.double() * target.geometric_k / 2).clamp(min=1)  # of float32's rounding, times beta
    assert ((stats.target_entropy - target_entropy).abs() <= 6e-6 * scale).all()
    assert ((stats.loss - loss).abs() <= 6e-6 * scale + 1e-6 * loss).all()
    assert ((stats.reverse_kl - reverse).abs() <= 2e-6 * scale + 1e-6 * reverse).all()
    sum_of_q = (stats.target_log_prob - log_q.gather(1, tokens[:, None])[:, 0]).exp()
    assert ((sum_of_q - 1).abs() <= (2e-6 * scale) * (1 + log_q.gather(1, tokens[:, None])[:, 0].abs())).all()
    assert ((gradient - exact).abs() <= 2e-6 * scale[:, None] + 2e-6 * loss[:, None]).all()
