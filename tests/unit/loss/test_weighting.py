# Copyright (c) 2026 the megatron_selfdistill authors. Apache-2.0.
"""The two terms of a token's loss, and truncated importance weights."""

from __future__ import annotations

import math

import pytest
import torch

from megatron_selfdistill.loss.weighting import Coefficients, SharedTokens, TruncatedImportance

W = torch.tensor([0.0, 0.5, 2.0, 1.0], dtype=torch.float64)
A = torch.tensor([-3.0, 0.0, 1.5, -0.25], dtype=torch.float64)


@pytest.mark.parametrize("log_prob", [-math.inf, math.nan])
def test_a_token_without_a_second_term_has_a_finite_loss_and_gradient_whatever_its_log_prob(log_prob):
    divergence = torch.tensor([4.0, 2.0], requires_grad=True)
    log_probs = torch.tensor([-1.0, log_prob], requires_grad=True)
    losses = Coefficients(torch.ones(2), torch.tensor([2.0, 0.0])).token_losses(divergence, log_probs)
    assert losses.tolist() == [6.0, 2.0]
    losses.sum().backward()
    assert divergence.grad.tolist() == [1.0, 1.0] and log_probs.grad.tolist() == [-2.0, 0.0]


def test_the_coefficients_of_microbatches_are_joined_where_all_of_them_have_the_same_terms():
    clipped = torch.tensor([False, True])
    parts = [Coefficients(W[:2], A[:2], clipped), Coefficients(W[2:], A[2:], ~clipped)]
    joined = Coefficients.concatenate(parts)
    assert torch.equal(joined.divergence, W) and torch.equal(joined.policy, A)
    assert joined.clipped.tolist() == [False, True, True, False]
    plain = Coefficients.concatenate([Coefficients(W[:2]), Coefficients(W[2:])])
    assert torch.equal(plain.divergence, W) and plain.policy is plain.clipped is None
    with pytest.raises(ValueError, match=r"Coefficients\.policy must be given for all .* got it for 1 of 2"):
        Coefficients.concatenate([parts[0], Coefficients(W[2:])])


def test_weights_are_the_ratio_of_probabilities_up_to_the_cap_in_the_rows_order():
    p = torch.tensor([0.5, 0.2, 0.9, 0.01], dtype=torch.float64)
    mu = torch.tensor([0.25, 0.4, 0.1, 0.01], dtype=torch.float64)
    rows = torch.tensor([2, 0, 3, 1])  # rows are packed in another order than the responses
    weights = TruncatedImportance(mu.log(), cap=3.0)(p[rows].log().float(), rows).divergence
    torch.testing.assert_close(weights, torch.tensor([3.0, 2.0, 1.0, 0.5]))


def test_the_factor_of_a_token_multiplies_its_weight_in_the_rows_order():
    factors = torch.tensor([0.25, 0.75, 1.5], dtype=torch.float64)
    order, log_prob = torch.tensor([2, 0]), torch.tensor([-1.0, -2.0], requires_grad=True)
    alone = SharedTokens(factors)(log_prob, order)
    assert alone.divergence.tolist() == [1.5, 0.25] and alone.policy is None
    inner = TruncatedImportance(torch.tensor([-2.0, -9.0, -2.0]), cap=4.0)
    both = SharedTokens(factors, inner)(log_prob, order)
    assert both.divergence.tolist() == pytest.approx([1.5 * math.e, 0.25])
    assert not both.divergence.requires_grad


def test_a_loss_of_two_terms_is_w_times_the_divergence_minus_a_times_the_log_prob():
    divergence = torch.tensor([4.0, 2.0, 0.5, 1.0], dtype=torch.float64, requires_grad=True)
    log_prob = torch.tensor([-1.0, -2.0, -4.0, -8.0], dtype=torch.float64, requires_grad=True)
    losses = Coefficients(W, A).token_losses(divergence, log_prob)
    assert losses.tolist() == [-3.0, 1.0, 7.0, -1.0]
    losses.sum().backward()
    assert torch.equal(divergence.grad, W) and torch.equal(log_prob.grad, -A)


def test_no_gradient_flows_through_a_weight():
    log_p = torch.tensor([-1.0], requires_grad=True)
    assert not TruncatedImportance(torch.tensor([-2.0]))(log_p, torch.tensor([0])).divergence.requires_grad
