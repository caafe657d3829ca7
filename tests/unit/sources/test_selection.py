# Copyright (c) 2026 the megatron_selfdistill authors. Apache-2.0.
"""Selections of responses: balanced groups, and responses that state how often their group is right."""

from __future__ import annotations

import math
import re

import pytest
from characters import ONE_RANK, STOP, Characters

from megatron_selfdistill.config.schema.run_config import CONFIDENCE
from megatron_selfdistill.data.problems import Problem
from megatron_selfdistill.data.prompts import PromptBuilder, PromptTemplates
from megatron_selfdistill.errors import VerifierError
from megatron_selfdistill.rollout.base import Response
from megatron_selfdistill.sources.problem_prompts import Answer, GivenSolutions
from megatron_selfdistill.sources.selection import Balance, FunctionSelection, StatedConfidence

PROBLEM = Problem("p", ({"role": "user", "content": "1+7"},), "so 8\nConfidence: 0.90", "8", "file.jsonl:1")
GIVEN = GivenSolutions(
    PromptBuilder(Characters(), PromptTemplates(teacher="{problem}|{solution}|now")), 300, 40, policy="error"
)


def answer(text: str, reward: float, group: int = 0, given: GivenSolutions = GIVEN) -> Answer:
    tokens = [ord(character) for character in text]
    response = Response(tokens, [-1.0] * len(tokens), [-1.0] * len(tokens), "stop" if text.endswith("$") else "length")
    return Answer(PROBLEM, given.pair(PROBLEM), response, group, reward)


def group_of(number: int, *rewards: float) -> list[Answer]:
    return [answer(f"{number}{i}$", reward, number) for i, reward in enumerate(rewards)]


def test_each_group_with_both_kinds_keeps_as_many_of_each():
    groups = [group_of(0, 1, 0, 0, 0, 0), group_of(1, 1, 1, 1), group_of(2, 0, 0), group_of(3, 1, 0, 1, 1, 0)]
    answers = [one for group in groups for one in group]
    kept, metrics = Balance(seed=5)(3, answers)
    rewards = [[one.reward for one in kept if one.group == number] for number in range(4)]
    assert [(sum(own), len(own)) for own in rewards] == [(1, 2), (3, 3), (0, 2), (2, 4)]
    assert [one.response for one in kept] == [one.response for one in answers if one in kept], "the order stays"
    assert metrics == {} and Balance(seed=5)(3, answers) == (kept, {}), (
        "the choice depends on seed, step and problem alone"
    )
    last = [one for one in answers if one.group == 3]
    assert Balance(seed=5)(3, last)[0] == [one for one in kept if one.group == 3]
    choices = {tuple(one.response.token_ids[1] for one in Balance(5)(step, groups[0])[0]) for step in range(30)}
    assert len(choices) == 4, "every wrong response is dropped and kept at times"


def text_of(tokens: list[int]) -> str:
    return "".join(map(chr, tokens))


def test_responses_and_the_solution_state_the_share_of_right_responses():
    select = StatedConfidence(GIVEN, re.compile(CONFIDENCE))
    answers = [answer("8\nConfidence: 0.99$", 1), answer("7 (confidence: 1) $", 0), answer("8$", 1), answer("9$", 0)]
    edited, _ = select(0, [*answers, answer("8$", 1, group=1)])
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
    assert all(len(one.response.sampled_log_probs) == len(one.response.token_ids) for one in edited)


@pytest.mark.parametrize(
    ("text", "max_length"), [("8", 300), ("8" * 30 + "$", 300), ("8$", 120)], ids=["truncated", "too long", "no room"]
)
def test_a_response_that_cannot_state_its_confidence_is_dropped(text, max_length):
    given = GivenSolutions(GIVEN.builder, max_length, 40, policy="error")
    assert StatedConfidence(given, re.compile(CONFIDENCE))(0, [answer(text, 1, given=given)])[0] == []


def selection(function, needs_log_probs: str | None = None) -> FunctionSelection:
    return FunctionSelection(function, Characters(), ONE_RANK, STOP, 5, needs_log_probs)


@pytest.fixture
def alone(monkeypatch):
    """Make a gathering over ranks return the part of this rank."""
    monkeypatch.setattr("megatron_selfdistill.evaluation.verify.gather_objects", lambda value: [value])


def test_a_function_keeps_drops_and_edits_responses(alone):
    def select(problem, responses):
        assert problem is PROBLEM and [reward for _, reward in responses] in ([1, 0, 0, 1], [0])
        edits = {"7": "8", "6": "far too long", "9": None}
        return [edits.get(text, text) for text, _ in responses]

    answers = [answer("8$", 1), answer("7", 0), answer("6$", 0), answer("9$", 1), answer("5", 0, group=3)]
    kept, _ = selection(select)(0, answers)
    assert [(text_of(one.response.token_ids), one.reward) for one in kept] == [("8$", 1), ("8$", 0), ("5", 0)]
    assert kept[0] is answers[0] and kept[2] is answers[4], "a truncated response may stay, too"
    edited = kept[1].response
    assert not edited.truncated and all(math.isnan(value) for value in edited.sampled_log_probs + edited.log_probs)


def test_a_function_may_not_edit_where_the_probability_of_the_sampled_text_counts(alone):
    answers = [answer("8$", 1), answer("7$", 0)]
    assert selection(lambda problem, texts: ["8", None], "policy.weight")(0, answers)[0] == answers[:1]
    with pytest.raises(VerifierError, match=r"the selection function failed .* since policy.weight compares p"):
        selection(lambda problem, texts: ["8", "8"], "policy.weight")(0, answers)
