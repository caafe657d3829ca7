# Copyright (c) 2026 the megatron_selfdistill authors. Apache-2.0.
"""SR-OPSD: the recipe's loss is the Renyi divergence from the geometric mean of teacher and reference."""

from __future__ import annotations

import pytest
import torch
from characters import Characters
from made_methods import composed, given_with, made
from term_arrays import signals

from megatron_selfdistill.config import ConfigError, load
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


def test_the_recipe_weighs_the_tokens_with_a_hint_alike_and_order_1_is_kl():
    config = composed("recipe=sr_opsd")
    assert Divergence.configured(config.loss, config.method) == Divergence("reverse_kl", order=0.5)
    one = composed("recipe=sr_opsd", "method.order=1")
    assert Divergence.configured(one.loss, one.method) == Divergence("reverse_kl")
    target = config.target
    assert (target.rule, target.k, target.teacher_weight, target.anchor) == ("fixed", None, 1.0, "reference")
    assert not config.needs.rewards and not config.measures_log_probs
    method = made(["recipe=sr_opsd"], given_with(Characters()))
    terms = method.terms(0, [], signals([0.0] * 2, lengths=[2, 1], hinted=[True, False]))
    assert not method.weighs_tokens and terms.divergence.tolist() == [1, 1, 0]


def test_the_jsd_is_refused():
    with pytest.raises(ConfigError, match=r"method\.name=sr_opsd needs loss\.divergence=reverse_kl or forward_kl"):
        load(["recipe=sr_opsd", "loss.divergence=jsd"])


@pytest.mark.parametrize("value", ["0", "4.5", "nan"])
def test_an_order_out_of_range_is_refused(value):
    with pytest.raises(ConfigError, match=r"method\.order must be"):
        load(["recipe=sr_opsd", f"method.order={value}"])
