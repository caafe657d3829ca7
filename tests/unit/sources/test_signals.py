# Copyright (c) 2026 the megatron_selfdistill authors. Apache-2.0.
"""The groups and episodes of signals: a response after two prompts is compared with those after the same prompt."""

from __future__ import annotations

from dataclasses import replace

from megatron_selfdistill.data.contexts import PromptPair
from megatron_selfdistill.data.problems import Problem
from megatron_selfdistill.methods.parts.terms import group_advantages
from megatron_selfdistill.rollout.base import Response
from megatron_selfdistill.sources.rollouts import Rollout
from megatron_selfdistill.sources.signals import signals_of

PROBLEM = Problem("p", ({"role": "user", "content": "1+7"},), "given", "8", "file.jsonl:1")


def rollout(reward: float, episode: int | None = None) -> Rollout:
    response = Response([5], [-1.0], [-1.0], "stop")
    return Rollout(PROBLEM, PromptPair("p", [1], [2]), response, group=3, reward=reward, episode=episode)


def test_each_view_of_a_group_is_a_group_of_its_own():
    plain = [rollout(1.0), rollout(0.0)]
    views = [*(one.in_privileged_view() for one in plain[:1]), *plain]
    found = signals_of(views)
    assert found.groups.tolist() == [0, 1, 1]
    assert group_advantages(found, "none").tolist() == [0.0, 0.5, -0.5]


def test_each_view_of_an_episode_is_an_episode_of_its_own():
    one = rollout(1.0, episode=4)
    assert signals_of([one.in_privileged_view(), one]).episodes.tolist() == [0, 1]


def test_turns_of_an_episode_are_numbered_and_rollouts_without_an_episode_stand_alone():
    one = rollout(1.0)
    turns = [replace(one, episode=4), replace(one, episode=4, turn=1), replace(one, episode=9), one, one]
    found = signals_of(turns)
    assert found.episodes.tolist() == [0, 0, 1, 2, 3] and found.turns.tolist() == [0, 1, 0, 0, 0]
