# Copyright (c) 2026 the megatron_selfdistill authors. Apache-2.0.
"""OpenClaw-RL: hints and rewards from the messages that follow logged replies, by votes and by functions."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import pytest
from characters import STOP, Characters
from made_methods import made, named
from term_arrays import signals

from megatron_selfdistill.chat_logs.replies import Turn, TurnReader
from megatron_selfdistill.config import DataConfig
from megatron_selfdistill.data.contexts import PromptPair
from megatron_selfdistill.data.end_tokens import EndTokens
from megatron_selfdistill.data.episode_reply import Reply
from megatron_selfdistill.data.given_solutions import GivenSolutions
from megatron_selfdistill.data.problems import AssistantReply, Problem
from megatron_selfdistill.data.prompt_templates import PromptTemplates
from megatron_selfdistill.data.prompts import PromptBuilder
from megatron_selfdistill.errors import VerifierError
from megatron_selfdistill.methods.openclaw import (
    JudgedReply,
    OpenclawSettings,
    decision_in,
    hint_in,
    longest_hint,
    majority,
)
from megatron_selfdistill.rollout.base import Request, Response, SamplingParams, response_text
from megatron_selfdistill.sources.rollouts import Rollout
from tests.unit.config.test_impossible_values import message_of
from tests.unit.sources.test_step_terms import coefficients

pytestmark = pytest.mark.usefixtures("one_rank")
HINT = "[HINT_START] use the second column [HINT_END] \\boxed{1}"


class Logged(Characters):
    """A tokenizer whose chat ends every reply in the stop token."""

    def render_chat(self, messages: Sequence[Any], *, add_generation_prompt: bool = True, **kwargs: Any) -> str:
        """Return the contents, a colon before every reply, and the stop token after it."""
        shown = [f":{m['content']}$" if m["role"] == "assistant" else m["content"] for m in messages]
        return "".join(shown) + ":" * add_generation_prompt


BUILDER = PromptBuilder(Logged(), PromptTemplates(teacher=OpenclawSettings.teacher_template), show_contents=False)


def turn(name: str, reply: str, *next_state: str, role: str = "user") -> Problem:
    message = {"role": "assistant", "content": reply}
    after = tuple({"role": role, "content": text} for text in next_state)
    logged = AssistantReply(message, accepted=False, next_state=after)
    return Problem(name, ({"role": "user", "content": f"ask {name}"},), "", None, f"log:{name}", reply=logged)


def replies(*problems: Problem) -> list[JudgedReply]:
    return [(problem, str(problem.reply.message["content"])) for problem in problems if problem.reply]


class Voter:
    """A sampler whose answers are the given texts, one after the other."""

    def __init__(self, *votes: str) -> None:
        self.votes, self.prompts = iter(votes), []  # type: ignore[var-annotated]

    def update_weights(self, version: int) -> None:
        assert version == 4

    def generate(self, requests: Sequence[Request], params: SamplingParams) -> list[Response]:
        self.prompts += ["".join(map(chr, request.prompt)) for request in requests]
        assert len({request.seed for request in requests}) == len(requests), "every vote has a stream of its own"
        texts = [f"{next(self.votes)}$" for _ in requests]
        return [Response([ord(c) for c in t], [0.0] * len(t), [0.0] * len(t), "stop") for t in texts]


def method_with(*overrides: str, max_length: int = 5000, sampler: Any = None) -> Any:
    given = GivenSolutions(BUILDER, max_length, 8, policy="drop")
    return made(["recipe=openclaw", "seed=5", "data.on_long_context=drop", *overrides], given, sampler=sampler)


@pytest.mark.parametrize(
    ("vote", "hint"),
    [
        (HINT, "use the second column"),
        (f"\\boxed{{-1}} {HINT}", "use the second column"),
        (f"{HINT} no: \\boxed{{-1}}", None),
        ("\\boxed{1}", None),
        ("[HINT_START]a[HINT_END]", None),
        ("[HINT_START]a[HINT_END] [HINT_START]b\nc[HINT_END]\\boxed{+1}", "b\nc"),
        (None, None),
    ],
)
def test_the_hint_of_a_vote_is_its_last_one_if_its_last_decision_is_one(vote, hint):
    assert hint_in(vote) == hint


def test_the_longest_hint_of_more_than_the_least_characters_counts():
    assert longest_hint(["0123456789", None, "0123456789a", "0123456789ab ", "0123456789cd"], 10) == "0123456789ab"
    assert longest_hint(["0123456789", None], 10) is None and longest_hint(["1"], 0) == "1"


@pytest.mark.parametrize(
    ("decisions", "reward"),
    [([1, 1, -1], 1.0), ([-1], -1.0), ([1, -1], 0.0), ([None, 1], 1.0), ([None], 0.0), ([0, 0, 1], 0.0), ([], 0.0)],
)
def test_the_reward_is_the_majority_of_the_votes(decisions, reward):
    assert majority(decisions) == reward
    assert decision_in("\\boxed{2} \\boxed{-1} \\boxed{x}") == -1


def test_the_model_judges_each_reply_by_its_votes():
    voter = Voter(HINT, "\\boxed{-1}", "\\boxed{-1}", "[HINT_START]short[HINT_END]\\boxed{1}")
    judged = replies(turn("a", "{role}", "no", "really"), turn("b", "2", "404", role="tool"))
    template = "method.judge_template='{role}: {next_state} / {response}'"
    assert method_with("method.votes=2", template, sampler=voter)._hints(4, judged) == ["use the second column", None]
    assert voter.prompts == ["user: no\nreally / {role}:"] * 2 + ["tool: 404 / 2:"] * 2


def test_the_model_rewards_each_reply_by_its_votes():
    voter = Voter("\\boxed{1}", "\\boxed{1}", "\\boxed{0}", "\\boxed{-1}", "none", "\\boxed{-1}")
    method = method_with("method.votes=3", sampler=voter)
    assert method._rewards(4, replies(turn("a", "1", "fine"), turn("b", "2", "no"))) == [1.0, -1.0]
    assert all("\\boxed{0}" in prompt for prompt in voter.prompts)


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
    for quotes in (False, True):
        method = method_with(
            f"method.judge={path}", f"method.reward={path}", f"conversations.show_contents={str(quotes).lower()}"
        )
        for failing in (method._hints, method._rewards):
            with pytest.raises(VerifierError) as caught:
                failing(4, judged)
            assert ("reply" in str(caught.value)) == quotes and "log:a: the " in str(caught.value)
    wrong = method_with(f"method.judge={named(monkeypatch, lambda *_: 3)}")
    with pytest.raises(VerifierError, match="expected a text or None, got a value of type int"):
        wrong._hints(4, judged)


def selected(monkeypatch: pytest.MonkeyPatch, weight: float, max_length: int = 70) -> tuple[list[Rollout], Any]:
    """Return what is trained on of three turns: the first has a hint, the second one that does not fit."""
    policies = DataConfig(on_long_context="drop", on_bad_record="skip")
    reader = TurnReader(BUILDER, EndTokens((STOP,), "", None), max_length, policies)
    problems = [turn("a", "11", "no"), turn("b", "22", "x" * 40), turn("c", "33", "thanks")]
    turns: Any = reader.read(problems)

    def judge(problem: Problem, *others: Any) -> str | float | None:
        """Return the hint of a problem, or the reward of the text ``problem``."""
        if isinstance(problem, str):
            return float(problem == "33")
        next_state = others[1]
        return None if next_state[0]["content"] == "thanks" else str(next_state[0]["content"])

    path = named(monkeypatch, judge)
    options = [f"method.judge={path}", f"method.reward={path}", "method.min_length=0", f"method.weight={weight}"]
    rollouts = [
        Rollout(problem, replace(one.prompts, teacher_prompt=one.prompts.student_prompt), logged_response(one))
        for problem, one in zip(problems, turns, strict=True)
    ]
    return method_with(*options, max_length=max_length).select(4, rollouts)


def logged_response(turn: Turn) -> Response:
    return Response.unsampled(turn.reply)


def test_a_turn_with_a_hint_is_trained_on_and_the_others_are_skipped(monkeypatch):
    [only], metrics = selected(monkeypatch, weight=0)
    shown = "".join(map(chr, only.prompts.teacher_prompt))
    assert shown == "ask a\n\n[user's hint / instruction]\nno:" and only.problem.solution == "no"
    assert "".join(map(chr, only.prompts.student_prompt)) == "ask a:"
    assert response_text(only.response, Logged()) == "11" and metrics == {"hints/share": pytest.approx(1 / 3)}


def test_turns_without_a_hint_stay_for_their_rewards_where_these_count(monkeypatch):
    rollouts, metrics = selected(monkeypatch, weight=1)
    assert [(one.problem.id, one.hinted, one.reward) for one in rollouts] == [
        ("a", True, 0.0),
        ("b", False, 0.0),
        ("c", False, 1.0),
    ]
    assert rollouts[2].prompts.teacher_prompt == rollouts[2].prompts.student_prompt
    assert metrics == {
        "hints/share": pytest.approx(1 / 3),
        "rewards/mean": pytest.approx(1 / 3),
        "rewards/trained_share": 1.0,
    }


def sampled(name: str, text: str, reply: Reply | None, reward: float) -> Rollout:
    """Return the second turn of an episode, whose student's prompt no template could render again."""
    said = [("user", "ask"), ("assistant", "1"), ("user", "go on")]
    problem = Problem(name, tuple({"role": role, "content": of} for role, of in said), "", None, "f:1", reworded=0)
    ids = [ord(character) for character in f"{text}$"]
    response = Response(ids, [0.0] * len(ids), [0.0] * len(ids), "stop")
    return Rollout(problem, PromptPair(name, [7], [7]), response, reply=reply, reward=reward)


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
    shown = "".join(map(chr, trained[0].prompts.teacher_prompt))
    assert shown == "ask:1$go on\n\n[user's hint / instruction]\n11: tool no:"
    assert trained[0].prompts.student_prompt == [7] and trained[0].hinted
    assert method.rewarded(rollouts) == (rollouts, {}) and not method.has_solution(rollouts[0].problem)
    if weight == 0:
        assert len(trained) == 1 and metrics == {"hints/share": 0.25}
        return
    assert [(one.problem.id, one.hinted, one.reward) for one in trained] == [
        *(("a", True, 2.0), ("b", False, 4.0), ("c", False, 0.75), ("d", False, 0.0))
    ]
    assert metrics == {"hints/share": 0.25, "rewards/mean": 6.75 / 4, "rewards/trained_share": 1.0}


def test_the_reward_of_a_turn_is_its_advantage():
    found = method_with("method.weight=0.5").terms(
        0, [], signals([1.0, -1.0], hinted=[False] * 2, lengths=[2, 1], mu=[0.0] * 3, q=[0.0] * 3)
    )
    assert found.advantage.tolist() == [0.5, 0.5, -0.5]
    assert not found.divergence.any() and not found.sampled_kl.any() and not found.likelihood.any()


def test_openclaw_takes_the_measured_probability_of_a_logged_reply_as_that_of_its_sampling():
    found = coefficients("recipe=openclaw", "method.weight=0.5", sampled=False)
    expected = [0.5 + 0.5, -1.0 + 0.5, 0.25, 1.0, 0.5]
    assert found.policy.tolist() == pytest.approx(expected), "rewards of 1, 0 and 1, the last one without a hint"
    assert not found.clipped.any() and found.divergence.tolist() == [0.0] * 5


def test_it_needs_logged_responses():
    words = "it needs data.kind=conversations and conversations.responses=logged, got problems and"
    assert words in message_of("method.name=openclaw")
