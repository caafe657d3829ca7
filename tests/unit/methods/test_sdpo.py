# Copyright (c) 2026 the megatron_selfdistill authors. Apache-2.0.
"""SDPO: hints that follow the responses, from peers, an environment's feedback, and the user's function of a group."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import pytest
from characters import Characters
from made_methods import given_with, made, named, response_of, shown

from megatron_selfdistill.data.given_solutions import GivenSolutions
from megatron_selfdistill.data.problems import Problem
from megatron_selfdistill.methods.sdpo import TEMPLATES
from megatron_selfdistill.sources.rollouts import Rollout

pytestmark = pytest.mark.usefixtures("one_rank")
PROBLEM = Problem("p", ({"role": "user", "content": "1+7"},), "given", "8", "file.jsonl:1")
OTHER = Problem("q", ({"role": "user", "content": "2+7"},), "given", "9", "file.jsonl:2")
GIVEN = given_with(Characters(), max_length=40)


def rollout(method: Any, problem: Problem, text: str) -> Rollout:
    return Rollout(problem, method.prompts(problem), response_of(text))


def hinted(keeps_unhinted: bool, hints: str = "peer", given: GivenSolutions = GIVEN) -> Any:
    """Return SDPO with these hints; with rewards in the loss it keeps the responses without a hint."""
    options = [f"method.hints={hints}", f"method.weight={int(keeps_unhinted)}", "rollout.num_samples=2"]
    return made(["method.name=sdpo", *options], given)


def judged(method: Any, group: int, problem: Problem, text: str, correct: bool) -> Rollout:
    return replace(rollout(method, problem, text), group=group, reward=float(correct))


def test_the_hint_is_the_first_other_right_response_of_the_group_without_its_thinking():
    method = hinted(keeps_unhinted=False)
    rollouts = [
        judged(method, 0, PROBLEM, "7$", False),
        judged(method, 0, PROBLEM, "hm</think> so 8$", True),
        judged(method, 0, PROBLEM, "8$", True),
        judged(method, 1, OTHER, "9$", True),
        judged(method, 1, OTHER, "1$", False),
        judged(method, 2, PROBLEM, "8$", False),
    ]
    chosen, metrics = method.select(0, rollouts)
    assert [(one.response, one.problem.solution) for one in chosen] == [
        (rollouts[0].response, "so 8"),
        (rollouts[1].response, "8"),
        (rollouts[2].response, "so 8"),
        (rollouts[4].response, "9"),
    ]
    assert all(f"|{one.problem.solution}" in shown(one) and one.hinted for one in chosen)
    assert not any("given" in shown(one) or "hm" in shown(one) for one in (*chosen, *rollouts))
    assert metrics == {"hints/share": pytest.approx(4 / 6)}


def test_a_peer_that_does_not_fit_into_the_prompt_is_no_hint():
    method = hinted(keeps_unhinted=True)
    rollouts = [judged(method, 0, PROBLEM, "8" * 60 + "$", True), judged(method, 0, PROBLEM, "7$", False)]
    chosen, _ = method.select(0, rollouts)
    assert [one.hinted for one in chosen] == [False, False]


FEEDBACK = "2 is wrong"
WIDE = given_with(Characters(), TEMPLATES["peer_or_feedback"], 200)


def with_feedback(keeps_unhinted: bool) -> list[Rollout]:
    """Return the chosen rollouts of a group with one right response, and of a group without any."""
    method = hinted(keeps_unhinted, "peer_or_feedback", WIDE)
    rollouts = [
        judged(method, 0, PROBLEM, "8$", True),
        replace(judged(method, 0, PROBLEM, "7$", False), feedback="seen by nobody"),
        replace(judged(method, 1, OTHER, "2$", False), feedback=FEEDBACK),
        judged(method, 1, OTHER, "3$", False),
    ]
    return method.select(0, rollouts)[0]


def test_the_teacher_sees_feedback_only_where_there_is_no_peer_in_the_words_of_sdpo():
    assert [shown(one) for one in with_feedback(keeps_unhinted=False)] == [
        "1+7\nCorrect solution:\n\n8\n\nCorrectly solve the original question.:",
        "2+7\nThe following is feedback from your unsuccessful earlier attempt:\n\n2 is wrong"
        "\n\nCorrectly solve the original question.:",
    ]


def test_feedback_alone_needs_no_reward_and_white_space_is_none():
    method = hinted(False, "feedback", replace(WIDE, builder=GIVEN.builder))
    texts = [FEEDBACK, None, " \n"]
    rollouts = [replace(rollout(method, PROBLEM, "7$"), feedback=text) for text in texts]
    chosen, metrics = method.select(0, rollouts)
    assert [shown(one) for one in chosen] == ["1+7|2 is wrong:"] and metrics == {"hints/share": pytest.approx(1 / 3)}


def longest_other(problem: Problem, responses: Sequence[tuple[str, float]]) -> list[str | None]:
    """Return for each wrong response the longest other response with the reward, and nothing for the right ones."""
    hints: list[str | None] = []
    for i, (_, reward) in enumerate(responses):
        others = [f"{text}={value:g}" for j, (text, value) in enumerate(responses) if j != i]
        hints.append(max(others, key=len) if reward < 0.5 and others else None)
    return hints


def test_a_function_of_the_group_gives_hints(monkeypatch):
    method = hinted(True, named(monkeypatch, longest_other))
    rollouts = [
        judged(method, 0, PROBLEM, "so 8$", True),
        judged(method, 4, OTHER, "1", False),
        judged(method, 4, OTHER, "22$", False),
        judged(method, 0, PROBLEM, "7$", False),
        judged(method, 6, PROBLEM, "7$", False),
    ]
    chosen, metrics = method.select(0, rollouts)
    assert [one.problem.solution if one.hinted else None for one in chosen] == [None, "22=0", "1=0", "so 8=1", None]
    assert all(f"|{one.problem.solution}" in shown(one) for one in chosen if one.hinted)
    assert metrics == {"hints/share": pytest.approx(3 / 5)}
