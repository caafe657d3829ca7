# Copyright (c) 2026 the megatron_selfdistill authors. Apache-2.0.
"""Veto: the recipe's target is the mix of teacher and current student in logit space, as a constant of the loss."""

from __future__ import annotations

import pytest
import torch
from made_methods import composed
from torch import Tensor

from megatron_selfdistill.loss import Divergence, Target, VocabShard, distillation_loss, mixed_target

ALPHAS = [0.0, 0.25, 0.5, 0.9]


def rows() -> tuple[Tensor, Tensor]:
    """Return float64 logits [6, 7] of student and teacher: random, equal, flat, sharp, tied and contradicting rows."""
    generator = torch.Generator().manual_seed(11)
    s, t = (2 * torch.randn(6, 7, generator=generator, dtype=torch.float64) for _ in "st")
    t[1] = s[1] + 3.0  # the same distribution
    s[2] = t[2] = 0.0
    t[3] = 15 * t[3]
    s[4, :2] = t[4, 2:4] = 12.0
    s[5], t[5] = torch.linspace(-4, 4, 7).double(), torch.linspace(4, -4, 7).double()
    return s, t


def target_of(alpha: float) -> Target:
    """Return the target of the recipe with w = alpha / (1 - alpha)."""
    return Target.configured(composed("recipe=veto", f"target.teacher_weight={alpha / (1 - alpha)}").target)


def interpolated(s: Tensor, t: Tensor, alpha: float) -> Tensor:
    """Return log q in float64: student^(1 - alpha) teacher^alpha, divided by its sum."""
    product = s.softmax(-1) ** (1 - alpha) * t.softmax(-1) ** alpha
    return (product / product.sum(-1, keepdim=True)).log()


@pytest.mark.parametrize("alpha", ALPHAS)
def test_the_target_is_the_weighted_geometric_mean_of_student_and_teacher(alpha):
    s, t = rows()
    found = mixed_target(s, t, target_of(alpha))
    torch.testing.assert_close(found.log_q, interpolated(s, t, alpha), rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("alpha", ALPHAS)
def test_the_gradient_is_that_of_forward_kl_to_a_constant_target(alpha):
    """The gradient to the student is p - q; a target that followed the student would have another one."""
    s, t = rows()
    wanted = s.softmax(-1) - interpolated(s, t, alpha).exp()
    student = s.float().requires_grad_()
    section = composed("recipe=veto").loss
    tokens, vocab = torch.zeros(len(s), dtype=torch.int64), VocabShard(0, s.shape[1], s.shape[1])
    divergence = Divergence(section.divergence)
    loss = distillation_loss(student, t.float(), tokens, target=target_of(alpha), divergence=divergence, vocab=vocab)
    (found,) = torch.autograd.grad(loss.loss.sum(), student)
    torch.testing.assert_close(found.double(), wanted, rtol=0, atol=2e-6)


def test_a_token_that_the_student_finds_unlikely_keeps_a_smaller_gradient_than_under_the_teacher_alone():
    """The veto: student .001, teacher .9; the geometric mean gives the token .087 at alpha = 1/2."""
    s, t = (torch.tensor([row], dtype=torch.float64).log() for row in ([0.999, 0.001], [0.1, 0.9]))
    q = mixed_target(s, t, target_of(0.5)).log_q.exp()[0, 1].item()
    share = (0.9 / 0.1 * 0.001 / 0.999) ** 0.5
    assert q == pytest.approx(share / (1 + share), abs=1e-12) and q < 0.1 < 0.9


def test_with_v_as_weight_and_as_k_the_teacher_keeps_its_full_weight():
    s, t = rows()
    section = composed("recipe=veto", "target.teacher_weight=4", "target.k=4").target
    torch.testing.assert_close(
        mixed_target(s, t, Target.configured(section)).log_q, (t + s / 4).log_softmax(-1), rtol=1e-12, atol=1e-12
    )
