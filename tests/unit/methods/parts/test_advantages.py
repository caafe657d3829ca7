# Copyright (c) 2026 the megatron_selfdistill authors. Apache-2.0.
"""Advantages from the rewards of a group, and the terms that several methods share, against numbers of the papers."""

from __future__ import annotations

import math
from types import SimpleNamespace

import pytest
import torch
from term_arrays import DELTA, LOG_MU, LOG_Q, RHO, STUDENT, TOKEN, coefficients, signals, tensor

from megatron_selfdistill.methods.parts import terms as parts
from megatron_selfdistill.methods.parts.terms import discounted_returns, group_advantages, uniform
from megatron_selfdistill.sources.signals import Terms


@pytest.mark.parametrize(
    ("std", "right", "wrong"),
    [("population", 1.732047, -0.577349), ("sample", 1.620182, -0.540061), ("none", 0.75, -0.25)],
)
def test_group_advantages_of_two_right_among_eight(std, right, wrong):
    rewards = (1, 0, 0, 1, 0, 0, 0, 0)
    expected = [right if reward else wrong for reward in rewards]
    assert group_advantages(signals(rewards), std).tolist() == pytest.approx(expected, abs=1e-6)


@pytest.mark.parametrize("std", ["population", "sample", "none"])
def test_equal_rewards_and_single_responses_have_no_advantage(std):
    found = group_advantages(signals([1, 1, 0, 0, 0, 1], groups=[0, 0, 1, 1, 1, 2]), std)
    assert found.tolist() == [0.0] * 6


def test_every_turn_of_an_episode_has_the_advantage_of_its_sum_of_rewards():
    # Three episodes of a group, of two, one and three turns, and one episode of another group.
    places = [0, 0, 1, 2, 2, 2, 3], [0, 1, 0, 0, 1, 2, 0]
    both = signals([0, 1, 1, 0, 0, 0, 5], [0] * 6 + [1], episodes=places[0], turns=places[1])
    assert group_advantages(both, "none").tolist() == pytest.approx([1 / 3] * 3 + [-2 / 3] * 3 + [0.0])
    both = signals([1, 0.5, 0, 0.25, 0], episodes=[0, 0, 0, 1, 1], turns=[0, 1, 2, 0, 1])
    assert group_advantages(both, "none").tolist() == pytest.approx([1.5 - 0.875] * 3 + [0.25 - 0.875] * 2)


@pytest.mark.parametrize("std", ["population", "sample", "none"])
@pytest.mark.parametrize("credit", ["episode", "turn"])
def test_an_episode_of_one_turn_is_a_response(std, credit):
    rewards, groups = [1, 0, 0, 0.5, 1, 0], [0, 0, 0, 1, 1, 1]
    single = signals(rewards, groups, episodes=[3, 1, 0, 2, 5, 4], turns=[0] * 6)
    assert torch.equal(group_advantages(single, std, credit), group_advantages(signals(rewards, groups), std))


def test_returns_of_turns_are_discounted_and_compared_with_the_same_turn():
    # RLTF, four episodes of two turns: R(y0) = (0, 0, 1, 0), R(y1) = (1, 0, 1, 1), gamma = .1.
    both = signals([0, 1, 0, 0, 1, 1, 0, 1], episodes=[0, 0, 1, 1, 2, 2, 3, 3], turns=[0, 1] * 4)
    found = group_advantages(both, "none", "turn", 0.1)
    assert found[::2].tolist() == pytest.approx([-0.225, -0.325, 0.775, -0.225], abs=1e-15)
    assert found[1::2].tolist() == pytest.approx([0.25, -0.75, 0.25, 0.25], abs=1e-15)


def test_a_turn_that_an_episode_does_not_reach_counts_in_no_mean():
    early = signals([1, 0, 1, 0, 0], episodes=[0, 1, 1, 2, 2], turns=[0, 0, 1, 0, 1])
    found = group_advantages(early, "none", "turn", 0.5)
    assert found.tolist() == pytest.approx([1 - 0.5, 0.5 - 0.5, 0.5, 0 - 0.5, -0.5])
    returns = discounted_returns(signals([0, 2, 8, 1, 0], episodes=[0, 0, 0, 1, 1], turns=[0, 1, 2, 0, 1]), 0.5)
    assert returns.tolist() == [0 + 0.5 * (2 + 0.5 * 8), 2 + 0.5 * 8, 8, 1, 0]


def test_advantage_of_a_response_is_that_of_each_of_its_tokens():
    settings = SimpleNamespace(weight=2.0, advantage_std="none", credit="episode", discount=1.0)
    both = signals([1, 0], lengths=[3, 2])
    terms = parts.group_advantage(both, settings)
    assert terms.advantage.tolist() == [1.0, 1.0, 1.0, -1.0, -1.0]
    assert not terms.divergence.any() and not terms.sampled_kl.any() and not terms.likelihood.any()
    assert torch.equal(parts.with_rewards(terms, both, settings).advantage, 2 * terms.advantage)
    settings.weight = 0.0
    assert parts.with_rewards(terms, both, settings) is terms


@pytest.mark.parametrize("signal", ["full", "sampled", "advantage"])
def test_uniform_signal_is_silent_without_a_hint(signal):
    both = signals([0, 1], hinted=[True, False], mu=[LOG_MU, LOG_MU], q=[LOG_Q, LOG_Q])
    terms = uniform(both, weight=0.3, signal=signal)
    fields = {"full": "divergence", "sampled": "sampled_kl", "advantage": "advantage", "none": "likelihood"}
    for name, field in fields.items():
        value = (name == signal) * 0.3 * (LOG_Q - LOG_MU if name == "advantage" else 1.0)
        assert getattr(terms, field).tolist() == pytest.approx([value, 0.0], abs=1e-11)


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
