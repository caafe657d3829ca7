# Copyright (c) 2026 the megatron_selfdistill authors. Apache-2.0.
"""Divergences on full rows: their definitions in float64, their gradients by autograd, their laws."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from megatron_selfdistill.loss import Divergence, divergence, divergence_gradient

DIVERGENCES = [
    Divergence("reverse_kl"),
    Divergence("forward_kl"),
    *(Divergence("jsd", lam) for lam in (0.1, 0.5, 0.8)),
]
every_divergence = pytest.mark.parametrize("kind", DIVERGENCES, ids=lambda d: f"{d.kind}-{d.jsd_lambda}")


def kl(log_a: Tensor, log_b: Tensor) -> Tensor:
    return (log_a.exp() * (log_a - log_b)).sum(-1)


def by_definition(log_p: Tensor, log_q: Tensor, kind: Divergence) -> Tensor:
    if kind.kind == "reverse_kl":
        return kl(log_p, log_q)
    if kind.kind == "forward_kl":
        return kl(log_q, log_p)
    lam = kind.jsd_lambda
    log_m = (lam * log_q.exp() + (1 - lam) * log_p.exp()).log()
    return lam * kl(log_q, log_m) + (1 - lam) * kl(log_p, log_m)


def pair(seed: int, scale: float = 2.0, shape: tuple[int, int] = (6, 50)) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    s, t = (scale * torch.randn(*shape, generator=generator, dtype=torch.float64) for _ in range(2))
    return s, t


@every_divergence
@pytest.mark.parametrize("scale", [0.01, 2.0, 20.0])
def test_value_and_gradient_equal_definition_and_autograd(kind: Divergence, scale: float) -> None:
    s, t = pair(0, scale)
    s.requires_grad_()
    log_q = t.log_softmax(-1)
    reference = by_definition(s.log_softmax(-1), log_q, kind)
    (expected,) = torch.autograd.grad(reference.sum(), s)
    log_p = s.detach().log_softmax(-1)
    bound = 4 * 50 * 2.0**-53 * max(1.0, scale)  # 50 terms, each with the rounding of a logit of this scale
    torch.testing.assert_close(divergence(log_p, log_q, kind), reference.detach(), rtol=1e-12, atol=bound)
    torch.testing.assert_close(divergence_gradient(log_p, log_q, kind), expected, rtol=1e-11, atol=bound)


@every_divergence
def test_gradient_equals_finite_differences(kind: Divergence) -> None:
    s, t = pair(1, shape=(1, 12))
    log_q, h = t.log_softmax(-1), 1e-5  # rounding is 2^-53 of sums near 5, over h: 6e-11; curvature is h^2: 1e-10
    offsets = h * torch.eye(12, dtype=torch.float64)
    up, down = (by_definition((s + sign * offsets).log_softmax(-1), log_q.expand(12, 12), kind) for sign in (1, -1))
    gradient = divergence_gradient(s.log_softmax(-1), log_q, kind)[0]
    torch.testing.assert_close(gradient, (up - down) / (2 * h), rtol=1e-7, atol=1e-9)


@every_divergence
def test_float32_is_no_worse_than_the_definition_in_float32(kind: Divergence) -> None:
    for scale in (1e-3, 0.1, 3.0):
        s, t = pair(2, scale, (32, 2000))
        exact = by_definition(s.log_softmax(-1), (s + 0.1 * t).log_softmax(-1), kind)
        log_p, log_q = s.float().log_softmax(-1), (s + 0.1 * t).float().log_softmax(-1)
        naive = (by_definition(log_p, log_q, kind).double() - exact).abs().max()
        ours = (divergence(log_p, log_q, kind).double() - exact).abs().max()
        assert ours <= naive + 1e-9


@every_divergence
@settings(max_examples=25, deadline=None)
@given(seed=st.integers(0, 10**6), scale=st.floats(0.0, 30.0))
def test_divergence_is_not_negative_and_its_gradient_sums_to_zero(kind: Divergence, seed: int, scale: float) -> None:
    s, t = pair(seed, scale)
    log_p, log_q = s.log_softmax(-1), t.log_softmax(-1)
    assert (divergence(log_p, log_q, kind) >= -1e-15).all()
    assert divergence_gradient(log_p, log_q, kind).sum(-1).abs().max() < 1e-13


@every_divergence
def test_divergence_is_zero_only_for_equal_distributions(kind: Divergence) -> None:
    s, _ = pair(3)
    log_p = s.log_softmax(-1)
    assert divergence(log_p, log_p, kind).abs().max() == 0
    assert divergence_gradient(log_p, log_p, kind).abs().max() < 1e-16
    moved = s.clone()
    moved[:, 0] += 1e-3
    assert (divergence(log_p, moved.log_softmax(-1), kind) > 1e-12).all()


@given(seed=st.integers(0, 10**6), scale=st.floats(0.0, 100.0))
@settings(max_examples=25, deadline=None)
def test_jsd_is_symmetric_at_one_half_and_at_most_log_2(seed: int, scale: float) -> None:
    s, t = pair(seed, scale)
    log_p, log_q = s.log_softmax(-1), t.log_softmax(-1)
    there, back = divergence(log_p, log_q, Divergence("jsd")), divergence(log_q, log_p, Divergence("jsd"))
    torch.testing.assert_close(there, back, rtol=1e-12, atol=1e-14)
    assert there.max() <= math.log(2) + 1e-12


def test_jsd_of_disjoint_distributions_is_log_2() -> None:
    log_p, log_q = torch.tensor([[0.0, -torch.inf]]), torch.tensor([[-torch.inf, 0.0]])
    assert divergence(log_p, log_q, Divergence("jsd")).item() == pytest.approx(math.log(2))


def test_reverse_and_forward_kl_are_infinite_where_a_column_is_one_sided() -> None:
    both = torch.tensor([[0.5, 0.5, 0.0]]).log()
    one = torch.tensor([[1.0, 0.0, 0.0]]).log()
    assert divergence(both, one, Divergence("reverse_kl")).item() == torch.inf
    assert divergence(one, both, Divergence("reverse_kl")).item() == pytest.approx(math.log(2))
    assert divergence(one, both, Divergence("forward_kl")).item() == torch.inf
    assert divergence(both, one, Divergence("forward_kl")).item() == pytest.approx(math.log(2))
    assert not torch.isfinite(divergence_gradient(both, one, Divergence("reverse_kl"))).all()


@every_divergence
def test_columns_of_minus_infinity_equal_removed_columns(kind: Divergence) -> None:
    s, t = pair(4)
    kept = torch.arange(50) % 3 != 0
    masked_s, masked_t = (x.masked_fill(~kept, -torch.inf) for x in (s, t))
    inside = masked_s.log_softmax(-1), masked_t.log_softmax(-1)
    outside = s[:, kept].log_softmax(-1), t[:, kept].log_softmax(-1)
    torch.testing.assert_close(divergence(*inside, kind), divergence(*outside, kind))
    gradient = divergence_gradient(*inside, kind)
    torch.testing.assert_close(gradient[:, kept], divergence_gradient(*outside, kind))
    assert (gradient[:, ~kept] == 0).all()
