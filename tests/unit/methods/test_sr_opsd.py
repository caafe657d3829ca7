# Copyright (c) 2026 the megatron_selfdistill authors. Apache-2.0.
"""SR-OPSD: the recipe's loss is the Renyi divergence from the geometric mean of teacher and reference."""

from __future__ import annotations

import pytest
import torch
from made_methods import composed

from megatron_selfdistill.loss import Divergence, Target, VocabShard, distillation_loss
from megatron_selfdistill.loss.target import unit_mix


@pytest.mark.parametrize("order", [0.05, 0.5, 2.0, 4.0])
@pytest.mark.parametrize("direction", ["reverse_kl", "forward_kl"])
def test_value_and_gradient_are_those_of_the_formula(order, direction):
    config = composed("recipe=sr_opsd", f"method.order={order}", f"loss.divergence={direction}")
    generator = torch.Generator().manual_seed(4)
    s, t, r = (2 * torch.randn(5, 9, generator=generator, dtype=torch.float64) for _ in "str")
    student = s.clone().requires_grad_()
    target = Target.configured(config.target)
    found = distillation_loss(
        student,
        unit_mix(r, t, target.teacher_weight).double(),
        torch.zeros(len(s), dtype=torch.int64),
        target=target,
        divergence=Divergence.configured(config.loss, config.method),
        vocab=VocabShard(0, s.shape[1], s.shape[1]),
    )
    found.loss.sum().backward()
    p, q = s.softmax(-1), (t.softmax(-1) * r.softmax(-1)).sqrt()
    q = q / q.sum(-1, keepdim=True)
    first, other, b = (p, q, order) if direction == "reverse_kl" else (q, p, 1 - order)
    product = first**order * other ** (1 - order)
    total = product.sum(-1, keepdim=True)
    torch.testing.assert_close(found.loss.detach(), (total.log() / (order - 1))[:, 0], rtol=1e-6, atol=1e-6)
    torch.testing.assert_close(student.grad, b / (order - 1) * (product / total - p), rtol=1e-5, atol=1e-6)
