# Copyright (c) 2026 the megatron_selfdistill authors. Apache-2.0.
"""The metrics of the rewards of a step."""

from __future__ import annotations

import pytest
import tiny
from characters import ONE_RANK

from megatron_selfdistill.sources.judge import reward_metrics
from megatron_selfdistill.sources.rollouts import Rollout

pytestmark = pytest.mark.usefixtures("one_rank")


def test_metrics_count_right_answers_mixed_groups_and_trained_ones():
    everything = [tiny.rollout("8$", reward, group) for group, reward in ((0, 1.0), (0, 0.0), (1, 1.0), (2, 1.0))]
    assert reward_metrics(everything, everything[:3], ONE_RANK) == {
        "rewards/mean": 0.75,
        "rewards/mixed_groups": pytest.approx(1 / 3),
        "rewards/trained_share": 0.75,
    }


def test_groups_are_mixed_where_episodes_have_other_rewards_turn_by_turn():
    def group(*rewards: tuple[float, ...]) -> list[Rollout]:
        return [
            tiny.rollout("8$", reward, episode=i, turn=turn)
            for i, of_turns in enumerate(rewards)
            for turn, reward in enumerate(of_turns)
        ]

    alike, other = group((0.0, 1.0), (0.0, 1.0)), group((0.0, 1.0), (1.0,))
    assert reward_metrics(alike, alike, ONE_RANK)["rewards/mixed_groups"] == 0.0
    assert reward_metrics(other, other, ONE_RANK)["rewards/mixed_groups"] == 1.0
