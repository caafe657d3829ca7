# Copyright (c) 2026 the megatron_selfdistill authors. Apache-2.0.
"""EOPD: the recipe's loss is reverse KL, and forward KL beside it where the teacher is uncertain."""

from __future__ import annotations

import pytest
import torch
from made_methods import composed
from torch import Tensor

from megatron_selfdistill.loss import Divergence, Target, VocabShard, distillation_loss


def rows() -> tuple[Tensor, Tensor]:
    """Return float64 logits [6, 9] of student and teacher, whose entropies lie between 0 and log 9."""
    generator = torch.Generator().manual_seed(2)
    s, t = (torch.randn(6, 9, generator=generator, dtype=torch.float64) for _ in "st")
    return s, torch.tensor([0.0, 0.5, 2.0, 4.0, 8.0, 30.0]).double()[:, None] * t


def published(s: Tensor, t: Tensor, tau: float) -> Tensor:
    """Return the loss of each row: KL(p || q), and where H(q) is above tau also KL(q || p)."""
    p, q = s.log_softmax(-1), t.log_softmax(-1)
    reverse, forward = (p.exp() * (p - q)).sum(-1), (q.exp() * (q - p)).sum(-1)
    return reverse + (-(q.exp() * q).sum(-1) > tau) * forward


@pytest.mark.parametrize("tau", [0.0, 0.8, 1.5, 100.0])
def test_value_and_gradient_are_those_of_the_published_rule(tau):
    config = composed("recipe=eopd", f"method.threshold={tau}")
    s, t = rows()
    student, leaf = s.clone().requires_grad_(), s.clone().requires_grad_()
    loss = published(student, t, tau)
    (wanted,) = torch.autograd.grad(loss.sum(), student)
    found = distillation_loss(
        leaf,
        t,
        torch.zeros(len(s), dtype=torch.int64),
        target=Target.configured(config.target),
        divergence=Divergence.configured(config.loss, config.method),
        vocab=VocabShard(0, s.shape[1], s.shape[1]),
    )
    torch.testing.assert_close(found.loss.detach(), loss.detach(), rtol=1e-11, atol=1e-12)
    found.loss.sum().backward()
    torch.testing.assert_close(leaf.grad, wanted, rtol=1e-11, atol=1e-12)
