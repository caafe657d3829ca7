# Copyright (c) 2026 the megatron_selfdistill authors. Apache-2.0.
"""Hints and edits that follow from a group of responses: SDPO, U-OPSD, CaOPD, and the selection of a function."""

from __future__ import annotations

import math
from dataclasses import replace
from functools import partial
from typing import Any

import pytest
import tiny
from characters import text_of
from made_methods import made, named, shown

from megatron_selfdistill.data.given_solutions import GivenSolutions
from megatron_selfdistill.errors import VerifierError
from megatron_selfdistill.evaluation.verify import math_verify
from megatron_selfdistill.methods.sdpo import TEMPLATES
from megatron_selfdistill.methods.u_opsd import pseudo_solutions

pytestmark = pytest.mark.usefixtures("one_rank")
OTHER = tiny.problem("2+7", "given", "9", id="q")
GIVEN = tiny.given()
WIDE = tiny.given(200, TEMPLATES["peer_or_feedback"])


def sdpo(keeps_unhinted: bool, hints: str = "peer", given: GivenSolutions = GIVEN) -> tuple[Any, Any]:
    """Return SDPO, which keeps responses without a hint for their rewards or not, and what makes its rollouts."""
    options = [f"method.hints={hints}", f"method.weight={int(keeps_unhinted)}", "rollout.num_samples=2"]
    method = made(["method.name=sdpo", *options], given)
    return method, partial(tiny.rollout, prompts=method)


def test_the_hint_is_the_first_other_right_response_of_the_group_without_its_thinking():
    method, rollout = sdpo(keeps_unhinted=False)
    first = [rollout(*sample) for sample in (("7$", 0), ("hm</think> so 8$", 1), ("8$", 1))]
    rollouts = [*first, rollout("9$", 1, 1, problem=OTHER), rollout("1$", 0, 1, problem=OTHER), rollout("8$", 0, 2)]
    chosen, metrics = method.select(0, rollouts)
    assert [one.problem.solution for one in chosen] == ["so 8", "8", "so 8", "9"]
    assert [one.response for one in chosen] == [rollouts[i].response for i in (0, 1, 2, 4)]
    assert all(f"|{one.problem.solution}" in shown(one) and one.hinted for one in chosen)
    assert not any("given" in shown(one) or "hm" in shown(one) for one in (*chosen, *rollouts))
    assert metrics == {"hints/share": pytest.approx(4 / 6)}


def test_a_peer_that_does_not_fit_into_the_prompt_is_no_hint():
    method, rollout = sdpo(keeps_unhinted=True)
    chosen, _ = method.select(0, [rollout("8" * 60 + "$", 1), rollout("7$", 0)])
    assert [one.hinted for one in chosen] == [False, False]


def test_the_teacher_sees_feedback_only_where_there_is_no_peer_in_the_words_of_sdpo():
    method, rollout = sdpo(False, "peer_or_feedback", WIDE)
    rollouts = [rollout("8$", 1), rollout("7$", 0, feedback="seen by nobody")]
    rollouts += [rollout("2$", 0, 1, problem=OTHER, feedback="2 is wrong"), rollout("3$", 0, 1, problem=OTHER)]
    assert [shown(one) for one in method.select(0, rollouts)[0]] == [
        "1+7\nCorrect solution:\n\n8\n\nCorrectly solve the original question.:",
        "2+7\nThe following is feedback from your unsuccessful earlier attempt:\n\n2 is wrong"
        "\n\nCorrectly solve the original question.:",
    ]


def test_feedback_alone_needs_no_reward_and_white_space_is_none():
    method, rollout = sdpo(False, "feedback", replace(WIDE, builder=GIVEN.builder))
    chosen, metrics = method.select(0, [rollout("7$", feedback=text) for text in ("2 is wrong", None, " \n")])
    assert [shown(one) for one in chosen] == ["1+7|2 is wrong:"] and metrics == {"hints/share": pytest.approx(1 / 3)}


def test_a_function_of_the_group_gives_hints(monkeypatch):
    def longest_other(problem: Any, responses: Any) -> list[str | None]:
        """Return for each wrong response the longest other one with its reward, and nothing for the right ones."""
        hints = []
        for i, (_, reward) in enumerate(responses):
            others = [f"{text}={value:g}" for j, (text, value) in enumerate(responses) if j != i]
            hints.append(max(others, key=len) if reward < 0.5 and others else None)
        return hints

    method, rollout = sdpo(True, named(monkeypatch, longest_other))
    rollouts = [rollout("so 8$", 1), rollout("1", 0, 4, problem=OTHER), rollout("22$", 0, 4, problem=OTHER)]
    chosen, metrics = method.select(0, [*rollouts, rollout("7$", 0), rollout("7$", 0, 6)])
    assert [one.problem.solution if one.hinted else None for one in chosen] == [None, "22=0", "1=0", "so 8=1", None]
    assert all(f"|{one.problem.solution}" in shown(one) for one in chosen if one.hinted)
    assert metrics == {"hints/share": pytest.approx(3 / 5)}


# U-OPSD: the first response of a majority is the hint of the responses that disagree with it.

VOTES = "aab aabb aaab abc aaaa a - ---- a--- aa-- aabbc baacaada -aab abab- aaaabcde aaabcdef"


def expected(answers: list[str | None], threshold: float) -> list[bool]:
    counts = {answer: answers.count(answer) for answer in answers if answer is not None}
    best = [answer for answer, count in counts.items() if count == max(counts.values())]
    if len(best) != 1 or counts[best[0]] / len(answers) < threshold:
        return [False] * len(answers)
    return [answer != best[0] for answer in answers]


@pytest.mark.parametrize("threshold", [0.0, 0.5, 0.75, 1.0])
def test_only_responses_that_disagree_with_a_majority_get_its_first_text(threshold):
    for votes in VOTES.split():
        answers = [None if vote == "-" else vote for vote in votes]
        texts = [None if vote == "-" else f"text {i} of {vote}" for i, vote in enumerate(votes)]
        found = pseudo_solutions(texts, answers, threshold)
        assert [hint is not None for hint in found] == expected(answers, threshold), votes
        majority = max(set(votes) - {"-"}, key=votes.count, default="")
        assert set(found) - {None} <= {f"text {votes.find(majority)} of {majority}"}
    assert pseudo_solutions(["hm</think> so 8", "8", "9"], ["8", "8", "9"], 0.5) == [None, None, "so 8"]


def test_groups_vote_apart_a_truncated_response_disagrees_and_the_verifier_decides_which_answers_are_equal():
    method = made(["recipe=u_opsd"], tiny.given())
    texts = ["8$", "7$", "8$", "8"], ["1$", "2$"], ["5$", "5$"], ["", "9$", "9$"]
    asked = [tiny.problem("1+7", ""), tiny.problem("2+7", "", id="q")]
    rollouts = [
        tiny.rollout(text, 0.0, 3 * group, problem=asked[group % 2], prompts=method)
        for group, members in enumerate(texts)
        for text in members
    ]
    assert not any("8" in shown(one) for one in rollouts), "no hint is known before the vote"
    chosen, metrics = method.select(0, rollouts)
    assert [one.response for one in chosen] == [rollouts[i].response for i in (1, 3, 8)]
    assert [one.problem.solution for one in chosen] == ["8", "8", "9"]
    assert all(one.hinted and f"|{one.problem.solution}" in shown(one) for one in chosen)
    assert metrics == {"hints/share": pytest.approx(3 / 11)}
    rollouts = [tiny.rollout(text, prompts=method) for text in (r"\boxed{1/2}$", r"\boxed{0.5}$", r"\boxed{3}$")]
    assert method.select(0, rollouts)[0] == [], "three texts are three answers"
    equal = replace(method.tools.judge, verifier=math_verify)
    chosen, _ = replace(method, tools=replace(method.tools, judge=equal)).select(0, rollouts)
    assert [(one.response, one.problem.solution) for one in chosen] == [(rollouts[2].response, r"\boxed{1/2}")]


# CaOPD: responses and the teacher's hint state how often the model solves the problem.

CONFIDENT = tiny.problem("1+7", "so 8\nConfidence: 0.90", "8")
NOW = tiny.given(300, "{problem}|{solution}|now", 40)


def test_responses_and_the_solution_state_the_share_of_right_responses():
    samples = [("8\nConfidence: 0.99$", 1), ("7 (confidence: 1) $", 0), ("8$", 1), ("9$", 0), ("8$", 1, 1)]
    rollouts = [tiny.rollout(*sample, problem=CONFIDENT, prompts=NOW) for sample in samples]
    edited, metrics = made(["recipe=caopd"], NOW).select(0, rollouts)
    stated = [f"{text}\nConfidence: 0.50$" for text in ("8", "7 ()", "8", "9")]
    assert [text_of(one.response.token_ids) for one in edited] == [*stated, "8\nConfidence: 1.00$"]
    hint = shown(edited[0])
    assert "|so 8\nConfidence: 0.50\n\nNote: The empirical confidence for this question is 0.50." in hint
    assert hint.endswith("|now:") and "0.90" not in hint and metrics == {}
    for one in edited:
        assert len(one.response.sampled_log_probs) == len(one.response.token_ids)
        assert all(math.isnan(value) for value in one.response.sampled_log_probs)


@pytest.mark.parametrize(
    ("text", "max_length"), [("8", 300), ("8" * 30 + "$", 300), ("8$", 120)], ids=["truncated", "too long", "no room"]
)
def test_a_response_that_cannot_state_its_confidence_is_dropped(text, max_length):
    given = replace(NOW, max_length=max_length)
    assert made(["recipe=caopd"], given).select(0, [tiny.rollout(text, 1, problem=CONFIDENT, prompts=given)])[0] == []


# A function of the user.


def test_a_function_keeps_drops_and_edits_responses_but_where_the_probability_of_the_sampled_text_counts(monkeypatch):
    def select(problem, responses):
        assert problem is asked and [reward for _, reward in responses] in ([1, 0, 0, 1], [0])
        edits = {"7": "8", "6": "far too long", "9": None}
        return [edits.get(text, text) for text, _ in responses]

    def selected(function, *overrides):
        options = [f"method.select={named(monkeypatch, function)}", "rollout.max_new_tokens=5", *overrides]
        return made(options, GIVEN).select(0, rollouts)[0]

    asked = tiny.problem("1+7", "so 8", "8")
    samples = [("8$", 1), ("7", 0), ("6$", 0), ("9$", 1), ("5", 0, 3)]
    rollouts = [tiny.rollout(*sample, problem=asked) for sample in samples]
    kept = selected(select)
    assert [(text_of(one.response.token_ids), one.reward) for one in kept] == [("8$", 1), ("8$", 0), ("5", 0)]
    assert kept[0] is rollouts[0] and kept[2] is rollouts[4], "a truncated response may stay, too"
    edited = kept[1].response
    assert not edited.truncated and all(math.isnan(value) for value in edited.sampled_log_probs + edited.log_probs)

    rollouts, rewards = rollouts[:2], ["method.name=grpo", "rollout.num_samples=2"]
    assert selected(lambda problem, texts: [texts[0][0], None], *rewards) == rollouts[:1]
    with pytest.raises(VerifierError, match=r"method\.name=grpo"):
        selected(lambda problem, texts: ["8", "8"], *rewards)
