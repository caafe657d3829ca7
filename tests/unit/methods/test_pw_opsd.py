# Copyright (c) 2026 the megatron_selfdistill authors. Apache-2.0.
"""PW-OPSD: the weight of each position of a response, against plain Python."""

from __future__ import annotations

import math

import pytest
import torch
from characters import Characters
from made_methods import given_with, made
from term_arrays import STUDENT, TEACHER, coefficients, signals, tensor

from megatron_selfdistill.methods.pw_opsd import position_weights
from megatron_selfdistill.sources.signals import Signals, Terms

ROWS = [[1], [1, 1, 1], [7], [1, 6, 2, 1], [40, 1]]
"""Lengths of the responses of a step."""
SCHEDULES = [(0.25, 0.3, 0.1), (0.0, 0.0, 1.0), (1.0, 0.5, 0.1), (0.5, 1.0, 0.02), (0.1, 0.5, 1e-6)]


def expected(lengths: list[int], least: float, midpoint: float, width: float) -> list[float]:
    """Return the published weights: 1-based tokens, and each token's middle as a share of its own response."""
    weights = []
    for length in lengths:
        for number in range(1, length + 1):
            x = ((number - 0.5) / length - midpoint) / width
            sigmoid = 1 / (1 + math.exp(-x)) if x > -700 else 0.0
            weights.append(least + (1 - least) * sigmoid)
    return weights


@pytest.mark.parametrize("lengths", ROWS, ids=str)
@pytest.mark.parametrize("schedule", SCHEDULES, ids=str)
def test_weights_are_those_of_the_paper_in_every_response(lengths, schedule):
    least, midpoint, width = schedule
    given = signals([0.0] * len(lengths), groups=[2 * i for i in range(len(lengths))], lengths=lengths)
    found = position_weights(given, least=least, midpoint=midpoint, width=width)
    assert found.dtype == torch.float64
    torch.testing.assert_close(found, tensor(*expected(lengths, *schedule)), rtol=1e-12, atol=1e-15)


def test_tokens_without_a_hint_have_no_divergence_and_the_settings_reach_the_terms():
    method = made(["recipe=pw_opsd", "method.least_weight=0.5", "method.midpoint=0.4"], given_with(Characters()))
    terms = method.terms(0, [], signals([0.0] * 3, lengths=[2, 3, 1], hinted=[True, False, True]))
    wanted = expected([2, 3, 1], 0.5, 0.4, 0.1)
    assert terms.divergence.tolist() == pytest.approx([*wanted[:2], 0.0, 0.0, 0.0, wanted[5]], abs=1e-15)
    assert not (terms.advantage.any() or terms.sampled_kl.any() or terms.likelihood.any())
    assert method.weighs_tokens


def test_a_replica_without_responses_has_no_weights():
    none = torch.tensor([], dtype=torch.int64)
    empty = Signals(none, none, none.double(), none.bool(), none.bool(), none.double())
    assert position_weights(empty, least=0.25, midpoint=0.3, width=0.1).tolist() == []


def test_the_gradient_of_a_token_is_its_weight_times_that_of_the_divergence():
    """Forward KL of one row of logits in float64, for the tokens of a response of two."""
    s = torch.tensor(STUDENT, dtype=torch.float64, requires_grad=True)
    log_q = tensor(*TEACHER).log_softmax(0)
    divergence = (log_q.exp() * (log_q - s.log_softmax(0))).sum()
    (plain,) = torch.autograd.grad(divergence, s, retain_graph=True)
    method = made(["recipe=pw_opsd"], given_with(Characters()))
    for number, weight in enumerate(expected([2], 0.25, 0.3, 0.1)):
        terms = method.terms(0, [], signals([0.0], lengths=[2]))
        one = Terms.of(tensor(0.0), divergence=terms.divergence[number : number + 1])
        found = coefficients(one, q=None).divergence
        (gradient,) = torch.autograd.grad(found.squeeze() * divergence, s, retain_graph=True)
        torch.testing.assert_close(gradient, weight * plain, rtol=1e-12, atol=0)
