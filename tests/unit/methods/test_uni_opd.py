# Copyright (c) 2026 the megatron_selfdistill authors. Apache-2.0.
"""The margin of Uni-OPD as a pure function of arrays, and its balance of right and wrong responses."""

from __future__ import annotations

import pytest
from characters import Characters
from made_methods import given_with
from term_arrays import signals, tensor

from megatron_selfdistill.data.problems import Problem
from megatron_selfdistill.methods.uni_opd import balanced, margin_shift, uni_opd
from megatron_selfdistill.rollout.base import Response
from megatron_selfdistill.sources.rollouts import Rollout

PROBLEM = Problem("p", ({"role": "user", "content": "1+7"},), "so 8", "8", "file.jsonl:1")
GIVEN = given_with(Characters())


@pytest.mark.parametrize(("gap", "half"), [("mean", 0.25), ("min_max", 0.325)])
def test_margin_shift_of_the_worked_example(gap, half):
    found = margin_shift(signals([1, 1, 0, 0]), tensor(-0.30, -0.10, -0.05, -0.15), 0.4, gap)
    assert found.tolist() == pytest.approx([half, half, -half, -half], abs=1e-12)


def test_uni_opd_shifts_every_token_and_masks_large_ratios():
    both = signals([1, 0], lengths=[2, 2], mu=[0.0, 0.0, 0.0, 0.0], q=[-0.2, -0.4, -12.0, 0.0])
    terms = uni_opd(both, weight=1.0, margin=8.0, gap="mean", max_log_ratio=10.0)
    shift = (8.0 - (-0.3 - -6.0)) / 2
    assert terms.advantage.tolist() == pytest.approx([-0.2 + shift, -0.4 + shift, 0.0, -shift], abs=1e-12)


def test_uni_opd_is_silent_without_a_hint():
    both = signals([1, 0], hinted=[False, True], mu=[0.0, 0.0], q=[-1.0, -1.0])
    assert uni_opd(both, weight=1.0, margin=0.4, gap="mean", max_log_ratio=10.0).advantage.tolist() == [0.0, -1.0]


def group_of(number: int, *rewards: float) -> list[Rollout]:
    pair = GIVEN.pair(PROBLEM)
    responses = [Response([number, i], [-1.0] * 2, [-1.0] * 2, "stop") for i in range(len(rewards))]
    return [Rollout(PROBLEM, pair, one, number, reward) for one, reward in zip(responses, rewards, strict=True)]


def test_each_group_with_both_kinds_keeps_as_many_of_each():
    groups = [group_of(0, 1, 0, 0, 0, 0), group_of(1, 1, 1, 1), group_of(2, 0, 0), group_of(3, 1, 0, 1, 1, 0)]
    rollouts = [one for group in groups for one in group]
    kept = balanced(rollouts, 5, 3)
    rewards = [[one.reward for one in kept if one.group == number] for number in range(4)]
    assert [(sum(own), len(own)) for own in rewards] == [(1, 2), (3, 3), (0, 2), (2, 4)]
    assert [one.response for one in kept] == [one.response for one in rollouts if one in kept], "the order stays"
    assert balanced(rollouts, 5, 3) == kept, "the choice depends on seed, step and problem alone"
    last = [one for one in rollouts if one.group == 3]
    assert balanced(last, 5, 3) == [one for one in kept if one.group == 3]
    choices = {tuple(one.response.token_ids[1] for one in balanced(groups[0], 5, step)) for step in range(30)}
    assert len(choices) == 4, "every wrong response is dropped and kept at times"
