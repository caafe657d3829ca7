# Copyright (c) 2026 the megatron_selfdistill authors. Apache-2.0.
"""OPSA: the fixed negative advantage of unlikely tokens, and its gradient, against float64."""

from __future__ import annotations

import math

import pytest
import torch
from term_arrays import SAMPLER, STUDENT, TOKEN, coefficients, log_probs, signals, tensor

from megatron_selfdistill.methods.opsa import opsa
from megatron_selfdistill.sources.signals import Clip

TIE = math.log(0.25)
"""The log of the threshold of these tests: a token with this log-prob is at the threshold."""
MU = [TIE, math.nextafter(TIE, -math.inf), math.nextafter(TIE, 0.0), 0.0, -1e-300, -745.0, -2.0]


def expected(mu: float, threshold: float, penalty: float) -> float:
    return -penalty if mu < math.log(threshold) else 0.0


@pytest.mark.parametrize("lengths", [[1] * 7, [7], [1, 5, 1]])
@pytest.mark.parametrize("penalty", [1.0, 0.125])
def test_only_tokens_below_the_threshold_get_the_advantage(lengths, penalty):
    given = signals([0.0] * len(lengths), groups=[3 * i for i in range(len(lengths))], lengths=lengths, mu=MU)
    terms = opsa(given, threshold=0.25, penalty=penalty)
    assert terms.advantage.dtype == torch.float64
    assert terms.advantage.tolist() == [0.0, -penalty, 0.0, 0.0, 0.0, -penalty, -penalty]
    assert terms.advantage.tolist() == [expected(mu, 0.25, penalty) for mu in MU]
    assert not (terms.divergence.any() or terms.sampled_kl.any() or terms.likelihood.any())


def test_a_replica_without_responses_has_no_terms():
    assert opsa(signals([], mu=[]), threshold=0.1, penalty=1.0).advantage.tolist() == []


@pytest.mark.parametrize(("low", "shift"), [(0.2, 0.0), (0.2, -0.5), (None, -0.5), (0.5, -0.5)])
def test_the_gradient_is_that_of_the_clipped_objective(low, shift):
    """The loss is -min(rho A, max(rho, 1 - low) A) with A = -c, in float64; ``shift`` moves log p away from log mu."""
    mu = log_probs(SAMPLER)[TOKEN].item()
    s = torch.tensor(STUDENT, dtype=torch.float64)
    s[TOKEN] += shift
    s.requires_grad_()
    log_p = s.log_softmax(0)[TOKEN]
    ratio, advantage = (log_p - mu).exp(), tensor(-1.5).squeeze()
    bounded = ratio if low is None else ratio.clamp(min=1 - low)
    (wanted,) = torch.autograd.grad(-torch.minimum(ratio * advantage, bounded * advantage), s, retain_graph=True)
    terms = opsa(signals([0.0], mu=[mu]), threshold=0.5, penalty=1.5)
    found = coefficients(terms, mu=mu, q=None, clip=Clip(low, 0.2), p=log_p.item())
    assert found.policy is not None and not found.divergence.any()
    (gradient,) = torch.autograd.grad(-found.policy.squeeze() * log_p, s)
    torch.testing.assert_close(gradient, wanted, atol=1e-14, rtol=0)
    is_clipped = low is not None and ratio.item() < 1 - low
    assert is_clipped == ((low, shift) == (0.2, -0.5)) == (gradient[TOKEN] == 0)
    assert is_clipped or gradient[TOKEN] > 0, "a step against the gradient makes the token less likely"
