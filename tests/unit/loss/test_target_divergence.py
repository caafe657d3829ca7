# Copyright (c) 2026 the megatron_selfdistill authors. Apache-2.0.
"""Divergences on full rows: their definitions in float64, their gradients by autograd, their laws."""

from __future__ import annotations

import math

import pytest
import torch
from logit_pairs import divergence as definition
from torch import Tensor

from megatron_selfdistill.loss import Divergence, divergence, divergence_gradient

ORDERS = [0.05, 0.5, 0.95, 0.9999, 1.0001, 1.5, 2.0, 4.0]
DIVERGENCES = [Divergence("reverse_kl"), Divergence("forward_kl"), *(Divergence("jsd", lam) for lam in (0.1, 0.5, 0.8))]
OTHERS = [
    *(Divergence(kind, order=order) for kind in ("reverse_kl", "forward_kl") for order in ORDERS),
    *(Divergence(forward_above=above) for above in (2.0, -1.0, math.inf)),
]


def pair(seed: int, scale: float = 2.0, shape: tuple[int, int] = (6, 50)) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    s, t = (scale * torch.randn(*shape, generator=generator, dtype=torch.float64) for _ in range(2))
    return s, t


@pytest.mark.parametrize("kind", [*DIVERGENCES, *OTHERS], ids=str)
@pytest.mark.parametrize("scale", [0.01, 2.0, 20.0])
def test_value_and_gradient_equal_definition_and_autograd(kind: Divergence, scale: float) -> None:
    s, t = pair(0, scale)
    s.requires_grad_()
    log_q = t.log_softmax(-1)
    reference = definition(s.log_softmax(-1), log_q, kind)
    (expected,) = torch.autograd.grad(reference.sum(), s)
    log_p = s.detach().log_softmax(-1)
    bound = 4 * 50 * 2.0**-53 * max(1.0, scale)  # 50 terms, each with the rounding of a logit of this scale
    if kind.is_renyi:  # the definition loses digits near order 1
        bound *= 16 * max(1.0, kind.order / abs(1 - kind.order))
    torch.testing.assert_close(divergence(log_p, log_q, kind), reference.detach(), rtol=1e-11, atol=bound)
    torch.testing.assert_close(divergence_gradient(log_p, log_q, kind), expected, rtol=1e-9, atol=bound)


@pytest.mark.parametrize("kind", DIVERGENCES, ids=str)
def test_float32_is_no_worse_than_the_definition_in_float32(kind: Divergence) -> None:
    for scale in (1e-3, 0.1, 3.0):
        s, t = pair(2, scale, (32, 2000))
        exact = definition(s.log_softmax(-1), (s + 0.1 * t).log_softmax(-1), kind)
        log_p, log_q = s.float().log_softmax(-1), (s + 0.1 * t).float().log_softmax(-1)
        naive = (definition(log_p, log_q, kind).double() - exact).abs().max()
        ours = (divergence(log_p, log_q, kind).double() - exact).abs().max()
        assert ours <= naive + 1e-9


@pytest.mark.parametrize("direction", ["reverse_kl", "forward_kl"])
def test_the_limit_at_order_1_is_kl(direction: str) -> None:
    log_p, log_q = (logits.log_softmax(-1) for logits in pair(5))
    plain = Divergence(direction)
    for order in (1 - 1e-7, 1 + 1e-7):
        near = Divergence(direction, order=order)
        for of in (divergence, divergence_gradient):
            torch.testing.assert_close(of(log_p, log_q, near), of(log_p, log_q, plain), rtol=1e-3, atol=1e-4)


def test_a_column_of_one_model_alone_is_infinite_for_kl_and_orders_above_1_in_one_direction() -> None:
    both, one = torch.tensor([[0.5, 0.5, 0.0]]).log(), torch.tensor([[1.0, 0.0, 0.0]]).log()
    for order, wanted in ((0.5, math.log(2)), (1.0, math.inf), (2.0, math.inf)):
        assert divergence(both, one, Divergence("reverse_kl", order=order)).item() == pytest.approx(wanted)
        assert divergence(one, both, Divergence("forward_kl", order=order)).item() == pytest.approx(wanted)
    for order in (1.0, 2.0):
        assert divergence(one, both, Divergence("reverse_kl", order=order)).item() == pytest.approx(math.log(2))
    assert divergence(both, one, Divergence("forward_kl")).item() == pytest.approx(math.log(2))
    assert not divergence_gradient(both, one, Divergence("reverse_kl")).isfinite().all()
    assert not divergence_gradient(both, one, Divergence("reverse_kl", order=2.0))[:, :2].isfinite().any()
    apart = torch.tensor([[1.0, 0.0]]).log(), torch.tensor([[0.0, 1.0]]).log()
    assert divergence(*apart, Divergence(order=0.5)).item() == math.inf
