# Copyright (c) 2026 the megatron_selfdistill authors. Apache-2.0.
"""The terms that several methods share, against numbers of the papers and gradients of autograd."""

from __future__ import annotations

import math
from types import SimpleNamespace

import pytest
import torch
from term_arrays import DELTA, LOG_MU, LOG_Q, RHO, STUDENT, TOKEN, coefficients, signals, tensor

from megatron_selfdistill.methods.parts.terms import group_advantage, uniform, with_rewards
from megatron_selfdistill.sources.signals import Terms


def test_advantage_of_a_response_is_that_of_each_of_its_tokens():
    settings = SimpleNamespace(weight=2.0, advantage_std="none", credit="episode", discount=1.0)
    both = signals([1, 0], lengths=[3, 2])
    terms = group_advantage(both, settings)
    assert terms.advantage.tolist() == [1.0, 1.0, 1.0, -1.0, -1.0]
    assert not terms.divergence.any() and not terms.sampled_kl.any() and not terms.likelihood.any()
    assert torch.equal(with_rewards(terms, both, settings).advantage, 2 * terms.advantage)
    settings.weight = 0.0
    assert with_rewards(terms, both, settings) is terms


@pytest.mark.parametrize(
    ("signal", "field", "value"),
    [("full", "divergence", 0.3), ("sampled", "sampled_kl", 0.3), ("advantage", "advantage", 0.3 * (LOG_Q - LOG_MU))],
)
def test_uniform_signal_is_silent_without_a_hint(signal, field, value):
    both = signals([0, 1], hinted=[True, False], mu=[LOG_MU, LOG_MU], q=[LOG_Q, LOG_Q])
    terms = uniform(both, weight=0.3, signal=signal)
    for name in ("divergence", "advantage", "sampled_kl", "likelihood"):
        expected = [value, 0.0] if name == field else [0.0, 0.0]
        assert getattr(terms, name).tolist() == pytest.approx(expected, abs=1e-11)


def test_the_sampled_signal_adds_its_pull_to_the_advantage():
    """The worked example of Skill-SD: the loss of the pull alone, its coefficient and gradient, and both parts."""
    one = signals([0.0], mu=[LOG_MU], q=[LOG_Q])
    pull = uniform(one, weight=1.0, signal="sampled")
    assert RHO * (math.exp(DELTA) - 1 - DELTA) == pytest.approx(0.594410944168, abs=1e-11)
    a = coefficients(pull).policy
    assert a.item() == pytest.approx(0.812124697702, abs=1e-11)
    s = torch.tensor(STUDENT, dtype=torch.float64, requires_grad=True)
    (gradient,) = torch.autograd.grad(-a.squeeze() * s.log_softmax(0)[TOKEN], s)
    expected = tensor(0.429593914900, -0.637464845900, 0.078479730300, 0.129391200700)
    torch.testing.assert_close(gradient, expected, atol=1e-10, rtol=0)
    both = uniform(one, weight=0.001, signal="sampled") + Terms.of(one.sampled_log_prob, advantage=tensor(0.7))
    assert coefficients(both).policy.item() == pytest.approx(0.560874781986 + 0.001 * 0.812124697702, abs=1e-11)
