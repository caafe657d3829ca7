# Copyright (c) 2026 the megatron_selfdistill authors. Apache-2.0.
"""CaOPD: responses and the teacher's hint state how often the model solves the problem."""

from __future__ import annotations

import math
from dataclasses import replace

import pytest
from characters import Characters, text_of
from made_methods import given_with, made, response_of

from megatron_selfdistill.data.given_solutions import GivenSolutions
from megatron_selfdistill.data.problems import Problem
from megatron_selfdistill.sources.rollouts import Rollout

PROBLEM = Problem("p", ({"role": "user", "content": "1+7"},), "so 8\nConfidence: 0.90", "8", "file.jsonl:1")
GIVEN = given_with(Characters(), "{problem}|{solution}|now", 300, 40)
SAMPLES = ["recipe=caopd"]


def rollout(text: str, reward: float, group: int = 0, given: GivenSolutions = GIVEN) -> Rollout:
    return Rollout(PROBLEM, given.pair(PROBLEM), response_of(text), group, reward)


def test_responses_and_the_solution_state_the_share_of_right_responses():
    rollouts = [
        rollout("8\nConfidence: 0.99$", 1),
        rollout("7 (confidence: 1) $", 0),
        rollout("8$", 1),
        rollout("9$", 0),
    ]
    edited, metrics = made(SAMPLES, GIVEN).select(0, [*rollouts, rollout("8$", 1, group=1)])
    assert [text_of(one.response.token_ids) for one in edited] == [
        "8\nConfidence: 0.50$",
        "7 ()\nConfidence: 0.50$",
        "8\nConfidence: 0.50$",
        "9\nConfidence: 0.50$",
        "8\nConfidence: 1.00$",
    ]
    note = (
        "Note: The empirical confidence for this question is 0.50. Output this exact value in the 'Confidence:' field."
    )
    assert f"|so 8\nConfidence: 0.50\n\n{note}|now" in text_of(edited[0].prompts.teacher_prompt)
    assert "0.90" not in text_of(edited[0].prompts.teacher_prompt)
    assert all(math.isnan(value) for one in edited for value in one.response.sampled_log_probs)
    assert all(len(one.response.sampled_log_probs) == len(one.response.token_ids) for one in edited) and metrics == {}


@pytest.mark.parametrize(
    ("text", "max_length"), [("8", 300), ("8" * 30 + "$", 300), ("8$", 120)], ids=["truncated", "too long", "no room"]
)
def test_a_response_that_cannot_state_its_confidence_is_dropped(text, max_length):
    given = replace(GIVEN, max_length=max_length)
    assert made(SAMPLES, given).select(0, [rollout(text, 1, given=given)])[0] == []
