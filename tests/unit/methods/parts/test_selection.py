# Copyright (c) 2026 the megatron_selfdistill authors. Apache-2.0.
"""A function of the user keeps, drops and edits the responses of a step."""

from __future__ import annotations

import math
from typing import Any

import pytest
from characters import Characters, text_of
from made_methods import given_with, made, named, response_of

from megatron_selfdistill.data.given_solutions import GivenSolutions
from megatron_selfdistill.data.problems import Problem
from megatron_selfdistill.errors import VerifierError
from megatron_selfdistill.sources.rollouts import Rollout

PROBLEM = Problem("p", ({"role": "user", "content": "1+7"},), "so 8\nConfidence: 0.90", "8", "file.jsonl:1")
GIVEN = given_with(Characters(), "{problem}|{solution}|now", 300, 40)
REWARDS = ["method.name=grpo", "rollout.num_samples=2"]


def rollout(text: str, reward: float, group: int = 0, given: GivenSolutions = GIVEN) -> Rollout:
    return Rollout(PROBLEM, given.pair(PROBLEM), response_of(text), group, reward)


@pytest.fixture
def selected(one_rank, monkeypatch):
    """Return a function that returns the rollouts that a function leaves."""

    def chosen(function: Any, rollouts: list[Rollout], *overrides: str) -> list[Rollout]:
        options = [f"method.select={named(monkeypatch, function)}", "rollout.max_new_tokens=5", *overrides]
        return made(options, GIVEN).select(0, rollouts)[0]

    return chosen


def test_a_function_keeps_drops_and_edits_responses(selected):
    def select(problem, responses):
        assert problem is PROBLEM and [reward for _, reward in responses] in ([1, 0, 0, 1], [0])
        edits = {"7": "8", "6": "far too long", "9": None}
        return [edits.get(text, text) for text, _ in responses]

    rollouts = [rollout("8$", 1), rollout("7", 0), rollout("6$", 0), rollout("9$", 1), rollout("5", 0, group=3)]
    kept = selected(select, rollouts)
    assert [(text_of(one.response.token_ids), one.reward) for one in kept] == [("8$", 1), ("8$", 0), ("5", 0)]
    assert kept[0] is rollouts[0] and kept[2] is rollouts[4], "a truncated response may stay, too"
    edited = kept[1].response
    assert not edited.truncated and all(math.isnan(value) for value in edited.sampled_log_probs + edited.log_probs)


def test_a_function_may_not_edit_where_the_probability_of_the_sampled_text_counts(selected):
    rollouts = [rollout("8$", 1), rollout("7$", 0)]
    assert selected(lambda problem, texts: ["8", None], rollouts, *REWARDS) == rollouts[:1]
    with pytest.raises(VerifierError, match=r"the selection function failed .* since method.name=grpo compares p"):
        selected(lambda problem, texts: ["8", "8"], rollouts, *REWARDS)
