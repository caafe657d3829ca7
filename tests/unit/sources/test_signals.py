# Copyright (c) 2026 the megatron_selfdistill authors. Apache-2.0.
"""The groups and episodes of signals: a response after two prompts is compared with those after the same prompt."""

from __future__ import annotations

from dataclasses import replace

import tiny

from megatron_selfdistill.methods.parts.terms import group_advantages
from megatron_selfdistill.sources.signals import signals_of


def test_each_view_of_a_group_is_a_group_of_its_own():
    plain = [tiny.rollout("8", 1.0, 3), tiny.rollout("7", 0.0, 3)]
    views = [*(one.in_privileged_view() for one in plain[:1]), *plain]
    found = signals_of(views)
    assert found.groups.tolist() == [0, 1, 1]
    assert group_advantages(found, "none").tolist() == [0.0, 0.5, -0.5]


def test_each_view_of_an_episode_is_an_episode_of_its_own():
    one = tiny.rollout("8", episode=4)
    assert signals_of([one.in_privileged_view(), one]).episodes.tolist() == [0, 1]


def test_turns_of_an_episode_are_numbered_and_rollouts_without_an_episode_stand_alone():
    one = tiny.rollout("8")
    turns = [replace(one, episode=4), replace(one, episode=4, turn=1), replace(one, episode=9), one, one]
    found = signals_of(turns)
    assert found.episodes.tolist() == [0, 0, 1, 2, 3] and found.turns.tolist() == [0, 1, 0, 0, 0]
