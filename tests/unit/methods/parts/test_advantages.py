# Copyright (c) 2026 the megatron_selfdistill authors. Apache-2.0.
"""Advantages from the rewards of a group, against numbers of the papers."""

from __future__ import annotations

import pytest
import torch
from term_arrays import signals

from megatron_selfdistill.methods.parts.terms import discounted_returns, group_advantages
from megatron_selfdistill.sources.signals import Signals


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


def test_groups_do_not_touch_each_other():
    one, other = [1, 0, 0], [0, 0.5, 1, 1]
    together = group_advantages(signals(one + other, groups=[0] * 3 + [1] * 4), "sample")
    apart = torch.cat([group_advantages(signals(rewards), "sample") for rewards in (one, other)])
    assert torch.equal(together, apart)


def episodes_of(rewards, episodes, turns, groups) -> Signals:
    return signals(rewards, groups, episodes=episodes, turns=turns)


def test_every_turn_of_an_episode_has_the_advantage_of_its_sum_of_rewards():
    # Three episodes of a group, of two, one and three turns, and one episode of another group.
    found = group_advantages(
        episodes_of([0, 1, 1, 0, 0, 0, 5], [0, 0, 1, 2, 2, 2, 3], [0, 1, 0, 0, 1, 2, 0], [0] * 6 + [1]), "none"
    )
    assert found.tolist() == pytest.approx([1 / 3] * 3 + [-2 / 3] * 3 + [0.0])


@pytest.mark.parametrize("std", ["population", "sample", "none"])
@pytest.mark.parametrize("credit", ["episode", "turn"])
def test_an_episode_of_one_turn_is_a_response(std, credit):
    rewards, groups = [1, 0, 0, 0.5, 1, 0], [0, 0, 0, 1, 1, 1]
    single = episodes_of(rewards, [3, 1, 0, 2, 5, 4], [0] * 6, groups)
    assert torch.equal(group_advantages(single, std, credit), group_advantages(signals(rewards, groups), std))


def test_returns_of_turns_are_discounted_and_compared_with_the_same_turn():
    # RLTF, four episodes of two turns: R(y0) = (0, 0, 1, 0), R(y1) = (1, 0, 1, 1), gamma = .1.
    rewards = [reward for pair in zip((0, 0, 1, 0), (1, 0, 1, 1), strict=True) for reward in pair]
    both = episodes_of(rewards, [0, 0, 1, 1, 2, 2, 3, 3], [0, 1] * 4, [0] * 8)
    found = group_advantages(both, "none", "turn", 0.1)
    assert found[::2].tolist() == pytest.approx([-0.225, -0.325, 0.775, -0.225], abs=1e-15)
    assert found[1::2].tolist() == pytest.approx([0.25, -0.75, 0.25, 0.25], abs=1e-15)


def test_a_turn_that_an_episode_does_not_reach_counts_in_no_mean():
    found = group_advantages(
        episodes_of([1, 0, 1, 0, 0], [0, 1, 1, 2, 2], [0, 0, 1, 0, 1], [0] * 5), "none", "turn", 0.5
    )
    assert found.tolist() == pytest.approx([1 - 0.5, 0.5 - 0.5, 0.5, 0 - 0.5, -0.5])


def test_the_return_of_an_episode_is_the_sum_over_all_of_its_turns():
    found = group_advantages(episodes_of([1, 0.5, 0, 0.25, 0], [0, 0, 0, 1, 1], [0, 1, 2, 0, 1], [0] * 5), "none")
    assert found.tolist() == pytest.approx([1.5 - 0.875] * 3 + [0.25 - 0.875] * 2)


def test_the_return_of_a_turn_has_the_discounted_rewards_of_all_later_turns():
    returns = discounted_returns(episodes_of([0, 2, 8, 1, 0], [0, 0, 0, 1, 1], [0, 1, 2, 0, 1], [0] * 5), 0.5)
    assert returns.tolist() == [0 + 0.5 * (2 + 0.5 * 8), 2 + 0.5 * 8, 8, 1, 0]
