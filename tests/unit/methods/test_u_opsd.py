# Copyright (c) 2026 the megatron_selfdistill authors. Apache-2.0.
"""U-OPSD: the vote of a group, and who sees the pseudo-solution."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
from characters import Characters
from made_methods import given_with, made, response_of, shown

from megatron_selfdistill.data.problems import Problem
from megatron_selfdistill.evaluation.verify import math_verify
from megatron_selfdistill.methods.u_opsd import pseudo_solutions
from megatron_selfdistill.sources.rollouts import Rollout

pytestmark = pytest.mark.usefixtures("one_rank")
PROBLEM = Problem("p", ({"role": "user", "content": "1+7"},), "", None, "file.jsonl:1")
OTHER = Problem("q", ({"role": "user", "content": "2+7"},), "", None, "file.jsonl:2")
GIVEN = given_with(Characters(), max_length=40)


def expected(answers: list[str | None], threshold: float) -> list[bool]:
    """Return for each response whether it has a hint, by counting every answer."""
    counts = {answer: answers.count(answer) for answer in answers if answer is not None}
    best = [answer for answer, count in counts.items() if count == max(counts.values())]
    if len(best) != 1 or counts[best[0]] / len(answers) < threshold:
        return [False] * len(answers)
    return [answer != best[0] for answer in answers]


@pytest.mark.parametrize("threshold", [0.0, 0.5, 0.75, 1.0])
@pytest.mark.parametrize(
    "votes",
    ["aab", "aabb", "aaab", "abc", "aaaa", "a", "-", "----", "a---", "aa--", "aabbc", "baacaada", "-aab", "abab-"],
)
def test_only_responses_that_disagree_with_a_majority_get_its_first_text(votes, threshold):
    answers = [None if vote == "-" else vote for vote in votes]
    texts = [None if vote == "-" else f"text {i} of {vote}" for i, vote in enumerate(votes)]
    found = pseudo_solutions(texts, answers, threshold)
    assert [hint is not None for hint in found] == expected(answers, threshold)
    if any(found):
        majority = max(set(votes) - {"-"}, key=votes.count)
        assert {hint for hint in found if hint is not None} == {f"text {votes.index(majority)} of {majority}"}


def test_a_share_at_the_threshold_is_a_majority_and_one_response_less_is_not():
    texts = ["x"] * 8
    assert any(pseudo_solutions(texts, ["a"] * 4 + list("bcde"), 0.5))
    assert not any(pseudo_solutions(texts, ["a"] * 3 + list("bcdef"), 0.5))


def test_the_pseudo_solution_has_no_thinking():
    assert pseudo_solutions(["hm</think> so 8", "8", "9"], ["8", "8", "9"], 0.5) == [None, None, "so 8"]


def rollout(method: Any, problem: Problem, group: int, text: str) -> Rollout:
    return replace(Rollout(problem, method.prompts(problem), response_of(text)), group=group)


def test_groups_vote_apart_and_a_truncated_response_disagrees():
    method = made(["recipe=u_opsd"], GIVEN)
    texts = ["8$", "7$", "8$", "8"], ["1$", "2$"], ["5$", "5$"], ["", "9$", "9$"]
    rollouts = [
        rollout(method, PROBLEM if group % 2 == 0 else OTHER, 3 * group, text)
        for group, members in enumerate(texts)
        for text in members
    ]
    assert not any("8" in shown(one) for one in rollouts), "no hint is known before the vote"
    chosen, metrics = method.select(0, rollouts)
    assert [one.response for one in chosen] == [rollouts[i].response for i in (1, 3, 8)]
    assert [one.problem.solution for one in chosen] == ["8", "8", "9"]
    assert all(one.hinted and f"|{one.problem.solution}" in shown(one) for one in chosen)
    assert metrics == {"hints/share": pytest.approx(3 / 11)}


def test_the_verifier_decides_which_answers_are_equal():
    method = made(["recipe=u_opsd"], GIVEN)
    equal = replace(method.tools.judge, verifier=math_verify)
    texts = [r"\boxed{1/2}$", r"\boxed{0.5}$", r"\boxed{3}$"]
    rollouts = [rollout(method, PROBLEM, 0, text) for text in texts]
    assert method.select(0, rollouts)[0] == [], "three texts are three answers"
    chosen, _ = replace(method, tools=replace(method.tools, judge=equal)).select(0, rollouts)
    assert [one.response for one in chosen] == [rollouts[2].response]
    assert chosen[0].problem.solution == r"\boxed{1/2}"
