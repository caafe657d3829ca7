# Copyright (c) 2026 the megatron_selfdistill authors. Apache-2.0.
"""OpenClaw: votes of the model or functions of the user judge what follows a reply, as hints and as rewards."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import replace
from types import SimpleNamespace
from typing import Any

import pytest
import tiny
import torch
from characters import STOP, Characters, text_of
from made_methods import TextSampler, made, named, response_of, shown
from term_arrays import signals

from megatron_selfdistill.chat_logs.replies import TurnReader
from megatron_selfdistill.config import DataConfig
from megatron_selfdistill.data.contexts import PromptPair
from megatron_selfdistill.data.end_tokens import EndTokens
from megatron_selfdistill.data.episode_reply import Reply
from megatron_selfdistill.data.given_solutions import GivenSolutions
from megatron_selfdistill.data.problems import AssistantReply, Problem
from megatron_selfdistill.data.prompt_templates import PromptTemplates
from megatron_selfdistill.data.prompts import PromptBuilder
from megatron_selfdistill.errors import VerifierError
from megatron_selfdistill.methods import openclaw
from megatron_selfdistill.methods.openclaw import OpenclawSettings, decision_in, hint_in, longest_hint, majority
from megatron_selfdistill.rollout.base import Response, response_text
from megatron_selfdistill.sources.rollouts import Rollout

pytestmark = pytest.mark.usefixtures("one_rank")
HINT = "[HINT_START] use the second column [HINT_END] \\boxed{1}"


class Logged(Characters):
    def render_chat(self, messages: Sequence[Any], *, add_generation_prompt: bool = True, **kwargs: Any) -> str:
        """Return the contents, a colon before every reply, and the stop token after it."""
        shown = [f":{m['content']}$" if m["role"] == "assistant" else m["content"] for m in messages]
        return "".join(shown) + ":" * add_generation_prompt


BUILDER = PromptBuilder(Logged(), PromptTemplates(teacher=OpenclawSettings.teacher_template), show_contents=False)


def turn(name: str, reply: str, *next_state: str, role: str = "user") -> Problem:
    after = tuple({"role": role, "content": text} for text in next_state)
    logged = AssistantReply({"role": "assistant", "content": reply}, accepted=False, next_state=after)
    return tiny.problem(f"ask {name}", "", id=name, location=f"log:{name}", reply=logged)


def replies(*problems: Problem) -> list[openclaw.JudgedReply]:
    return [(problem, str(problem.reply.message["content"])) for problem in problems if problem.reply]


def method_with(*overrides: str, max_length: int = 5000, **tools: Any) -> Any:
    given = GivenSolutions(BUILDER, max_length, 8, policy="drop")
    return made(["recipe=openclaw", "seed=5", "data.on_long_context=drop", *overrides], given, **tools)


@pytest.mark.parametrize(
    ("vote", "hint"),
    [
        (HINT, "use the second column"),
        (f"{HINT} no: \\boxed{{-1}}", None),
        ("\\boxed{1}", None),
        ("[HINT_START]a[HINT_END]", None),
        ("[HINT_START]a[HINT_END] [HINT_START]b\nc[HINT_END]\\boxed{+1}", "b\nc"),
        (None, None),
    ],
)
def test_the_hint_of_a_vote_is_its_last_one_if_its_last_decision_is_one(vote, hint):
    assert hint_in(vote) == hint


def test_the_longest_hint_of_more_than_the_least_characters_counts_and_the_majority_of_decisions():
    assert longest_hint(["0123456789", None, "0123456789a", "0123456789ab ", "0123456789cd"], 10) == "0123456789ab"
    assert longest_hint(["0123456789", None], 10) is None and longest_hint(["1"], 0) == "1"
    decisions = [[1, 1, -1], [-1], [1, -1], [None, 1], [None], [0, 0, 1], []]
    assert list(map(majority, decisions)) == [1, -1, 0, 1, 0, 0, 0]
    assert decision_in("\\boxed{2} \\boxed{-1} \\boxed{x}") == -1


def test_the_model_judges_and_rewards_each_reply_by_its_votes():
    votes = [HINT, "\\boxed{-1}", "\\boxed{-1}", "[HINT_START]short[HINT_END]\\boxed{1}"]
    voter = TextSampler(4, *(f"{vote}$" for vote in votes))
    judged = replies(turn("a", "{role}", "no", "really"), turn("b", "2", "404", role="tool"))
    template = "method.judge_template='{role}: {next_state} / {response}'"
    assert method_with("method.votes=2", template, sampler=voter)._hints(4, judged) == ["use the second column", None]
    prompts = ["user: no\nreally / {role}:"] * 2 + ["tool: 404 / 2:"] * 2
    assert [text_of(request.prompt) for request in voter.requests] == prompts
    assert len({request.seed for request in voter.requests}) == 4, "every vote has a stream of its own"
    voter = TextSampler(4, *(f"\\boxed{{{vote}}}$" for vote in (1, 1, 0, -1, "none", -1)))
    method = method_with("method.votes=3", sampler=voter)
    assert method._rewards(4, replies(turn("a", "1", "fine"), turn("b", "2", "no"))) == [1.0, -1.0]
    assert all("\\boxed{0}" in text_of(request.prompt) for request in voter.requests)


def test_functions_judge_replies_and_may_not_quote_the_log(monkeypatch):
    def judge(problem: Problem, text: str, next_state: list[dict[str, Any]]) -> str | None:
        return f"{problem.id} {text} {next_state[0]['content']}" if text == "reply" else None

    judged = replies(turn("a", "reply", "better so"), turn("b", "other", "fine"))
    by_function = f"method.judge={named(monkeypatch, judge)}"
    assert method_with(by_function)._hints(4, judged) == ["a reply better so", None]
    assert method_with(by_function, "method.min_length=30")._hints(4, judged) == [None, None]
    by_length = f"method.reward={named(monkeypatch, lambda text, problem: len(text) / 2)}"
    assert method_with(by_length)._rewards(4, judged) == [2.5, 2.5]

    def fails(*arguments: Any) -> Any:
        raise KeyError(judged[0][1])

    path = named(monkeypatch, fails)
    for quotes in ("false", "true"):
        options = [f"method.judge={path}", f"method.reward={path}", f"conversations.show_contents={quotes}"]
        for failing in (method_with(*options)._hints, method_with(*options)._rewards):
            with pytest.raises(VerifierError, match="log:a: the ") as caught:
                failing(4, judged)
            assert ("reply" in str(caught.value)) == (quotes == "true")
    with pytest.raises(VerifierError, match="type int"):
        method_with(f"method.judge={named(monkeypatch, lambda *_: 3)}")._hints(4, judged)


@pytest.mark.parametrize("weight", [0, 1])
def test_a_turn_with_a_hint_is_trained_on_and_the_others_stay_for_their_rewards_where_these_count(monkeypatch, weight):
    """The first of three turns has a hint, and the second one that does not fit."""
    policies = DataConfig(on_long_context="drop", on_bad_record="skip")
    problems = [turn("a", "11", "no"), turn("b", "22", "x" * 40), turn("c", "33", "thanks")]
    turns: Any = TurnReader(BUILDER, EndTokens((STOP,), "", None), 70, policies).read(problems)

    def judge(problem: Any, *others: Any) -> str | float | None:
        """Return the hint of a problem, or the reward of the text ``problem``."""
        if isinstance(problem, str):
            return float(problem == "33")
        said = str(others[1][0]["content"])
        return None if said == "thanks" else said

    path = named(monkeypatch, judge)
    options = [f"method.judge={path}", f"method.reward={path}", "method.min_length=0", f"method.weight={weight}"]
    plain = [replace(one.prompts, teacher_prompt=one.prompts.student_prompt) for one in turns]
    logged = [Response.unsampled(one.reply) for one in turns]
    rollouts = list(map(Rollout, problems, plain, logged))
    first, *others = (chosen := method_with(*options, max_length=70).select(4, rollouts))[0]
    assert shown(first) == "ask a\n\n[user's hint / instruction]\nno:" and first.problem.solution == "no"
    assert text_of(first.prompts.student_prompt) == "ask a:" and response_text(first.response, Logged()) == "11"
    metrics = {"hints/share": pytest.approx(1 / 3)}
    if weight:
        found = [(one.problem.id, one.hinted, one.reward) for one in (first, *others)]
        assert found == [("a", True, 0.0), ("b", False, 0.0), ("c", False, 1.0)]
        assert others[1].prompts.teacher_prompt == others[1].prompts.student_prompt
        metrics |= {"rewards/mean": pytest.approx(1 / 3), "rewards/trained_share": 1.0}
    assert chosen[1] == metrics and len(others) == 2 * weight


def sampled(name: str, text: str, reply: Reply | None, reward: float) -> Rollout:
    """Return the second turn of an episode, whose student's prompt no template could render again."""
    said = [("user", "ask"), ("assistant", "1"), ("user", "go on")]
    messages = tuple({"role": role, "content": of} for role, of in said)
    problem = tiny.problem(solution="", id=name, messages=messages, reworded=0)
    return Rollout(problem, PromptPair(name, [7], [7]), response_of(f"{text}$"), reply=reply, reward=reward)


@pytest.mark.parametrize("weight", [1, 0])
def test_the_reply_of_an_environment_is_the_next_state_of_a_sampled_turn(monkeypatch, weight):
    """A turn without a text after it, such as the last one, keeps the reward of the environment and has no hint."""

    def judge(*arguments: Any) -> str | float | None:
        """Return the hint for a problem, a text and a next state, or the reward for a text and a problem."""
        if len(arguments) == 3:
            _, text, [next_state] = arguments
            return f"{text}: {next_state['role']} {next_state['content']}" if text == "11" else None
        text, problem = arguments
        assert problem.reply.message["content"] == text
        return float(len(problem.reply.next_state[0]["content"]))

    path = named(monkeypatch, judge)
    functions = [f"method.judge={path}", f"method.reward={path}"]
    live = ["data.kind=problems", "method.live=true", "environment.name=a.b", "environment.max_turns=3"]
    method = method_with(*live, *functions, "method.min_length=0", f"method.weight={weight}")
    rollouts = [
        sampled("a", "11", Reply("no", role="tool", done=False), 0.25),
        sampled("b", "22", Reply("fine", done=False), 0.25),
        sampled("c", "33", Reply(None, done=True), 0.75),
        sampled("d", "44", None, 0.0),
    ]
    trained, metrics = method.select(4, rollouts)
    assert shown(trained[0]) == "ask:1$go on\n\n[user's hint / instruction]\n11: tool no:"
    assert trained[0].prompts.student_prompt == [7] and trained[0].hinted
    assert method.rewarded(rollouts) == (rollouts, {}) and not method.has_solution(rollouts[0].problem)
    rewards = {"rewards/mean": 6.75 / 4, "rewards/trained_share": 1.0}
    assert metrics == {"hints/share": 0.25} | (rewards if weight else {})
    expected = [("a", True, 2.0), ("b", False, 4.0), ("c", False, 0.75), ("d", False, 0.0)]
    found = [(one.problem.id, one.hinted, one.reward) for one in trained]
    assert found == expected if weight else [name for name, *_ in found] == ["a"]


def test_the_reward_of_a_turn_is_its_advantage_and_the_measured_probability_that_of_its_sampling():
    both = signals([1.0, -1.0], hinted=[False] * 2, lengths=[2, 1], mu=[0.0] * 3, q=[0.0] * 3)
    terms = method_with("method.weight=0.5").terms(0, [], both)
    assert terms.advantage.tolist() == [0.5, 0.5, -0.5]
    assert not terms.divergence.any() and not terms.sampled_kl.any() and not terms.likelihood.any()

    p, q = (torch.tensor(values, dtype=torch.float64) for values in ([-1.0, -2.0, -1.0], [-0.5, -3.0, -1.25]))
    measured = {"student_log_prob": p, "target_log_prob": q}
    unknown = response_of("1$", [math.nan] * 2), response_of("2", [math.nan])
    logged = [
        replace(tiny.rollout("", 1.0), response=one, hinted=hinted)
        for one, hinted in zip(unknown, (True, False), strict=True)
    ]
    method = method_with("method.weight=0.5", readers=SimpleNamespace(token_signals=lambda contexts: measured))
    found = method.coefficients(0, logged, [])(p, torch.arange(3))
    assert found.policy.tolist() == pytest.approx([0.5 + 0.5, -1.0 + 0.5, 0.5]), "the last one has no hint"
    assert not found.clipped.any() and not found.divergence.any()
