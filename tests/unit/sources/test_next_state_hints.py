# Copyright (c) 2026 the megatron_selfdistill authors. Apache-2.0.
"""Hints and rewards from the messages that follow logged replies, by the model's votes and by functions."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import pytest
import torch.distributed as dist
from characters import ONE_RANK, STOP, Characters

from megatron_selfdistill.data.chat.replies import TurnReader
from megatron_selfdistill.data.problems import LoggedReply, Problem
from megatron_selfdistill.data.prompts import TEACHER_TEMPLATES, PromptBuilder, PromptTemplates
from megatron_selfdistill.errors import VerifierError
from megatron_selfdistill.metrics import Phases
from megatron_selfdistill.rollout.base import Request, Response, SamplingParams, response_text
from megatron_selfdistill.sources.asked_model import AskedModel, asking_builder
from megatron_selfdistill.sources.hinted_turns import HintedTurns
from megatron_selfdistill.sources.next_state_hints import (
    JUDGE_TEMPLATE,
    REWARD_TEMPLATE,
    FunctionHintJudge,
    FunctionRewardJudge,
    JudgedReply,
    ModelHintJudge,
    decision_in,
    hint_in,
    longest_hint,
    majority,
)

SAMPLING = SamplingParams(8)
HINT = "[HINT_START] use the second column [HINT_END] \\boxed{1}"


class Logged(Characters):
    """A tokenizer whose chat ends every reply in the stop token."""

    def render_chat(self, messages: Sequence[Any], *, add_generation_prompt: bool = True, **kwargs: Any) -> str:
        """Return the contents, a colon before every reply, and the stop token after it."""
        shown = [f":{m['content']}$" if m["role"] == "assistant" else m["content"] for m in messages]
        return "".join(shown) + ":" * add_generation_prompt


BUILDER = PromptBuilder(Logged(), PromptTemplates(teacher=TEACHER_TEMPLATES["next_state"]), show_contents=False)


@pytest.fixture(autouse=True)
def one_rank(monkeypatch):
    """Make collectives return the part of this rank."""
    monkeypatch.setattr(dist, "all_reduce", lambda tensor, group=None: tensor)
    monkeypatch.setattr("megatron_selfdistill.evaluation.verify.gather_objects", lambda value: [value])


def turn(name: str, reply: str, *next_state: str, role: str = "user") -> Problem:
    message = {"role": "assistant", "content": reply}
    after = tuple({"role": role, "content": text} for text in next_state)
    logged = LoggedReply(message, accepted=False, next_state=after)
    return Problem(name, ({"role": "user", "content": f"ask {name}"},), "", None, f"log:{name}", reply=logged)


def replies(*problems: Problem) -> list[JudgedReply]:
    return [JudgedReply(problem, str(problem.reply.message["content"])) for problem in problems if problem.reply]


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


def asked(*votes: str) -> tuple[AskedModel, Voter]:
    voter: Any = Voter(*votes)
    return AskedModel(voter, asking_builder(BUILDER), Phases(), 5, 5000), voter


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
    model, voter = asked(HINT, "\\boxed{-1}", "\\boxed{-1}", "[HINT_START]short[HINT_END]\\boxed{1}")
    judged = replies(turn("a", "{role}", "no", "really"), turn("b", "2", "404", role="tool"))
    judge = ModelHintJudge(model, "{role}: {next_state} / {response}", 2, 10)
    assert judge(4, SAMPLING, judged) == ["use the second column", None]
    assert voter.prompts == ["user: no\nreally / {role}:"] * 2 + ["tool: 404 / 2:"] * 2


def test_the_requests_hold_the_turn_and_the_rule_for_tools():
    rule = "This content was NOT available before the assistant's action"
    [reply] = replies(turn("a", "the reply", "the next", role="tool"))
    for template in (JUDGE_TEMPLATE, REWARD_TEMPLATE):
        request = reply.request(template)
        assert rule in request and "the reply" in request and "role='tool'\nthe next" in request
    assert "\\boxed{-1}" in JUDGE_TEMPLATE and "[HINT_START]" in JUDGE_TEMPLATE and "\\boxed{0}" in REWARD_TEMPLATE


def test_functions_judge_replies_and_may_not_quote_the_log():
    def judge(problem: Problem, text: str, next_state: list[dict[str, Any]]) -> str | None:
        return f"{problem.id} {text} {next_state[0]['content']}" if text == "reply" else None

    judged = replies(turn("a", "reply", "better so"), turn("b", "other", "fine"))
    assert FunctionHintJudge(judge, 10, ONE_RANK, quotes=False)(4, SAMPLING, judged) == ["a reply better so", None]
    assert FunctionHintJudge(judge, 30, ONE_RANK, quotes=False)(4, SAMPLING, judged) == [None, None]
    rewards = FunctionRewardJudge(lambda text, problem: len(text) / 2, ONE_RANK, quotes=False)
    assert rewards(4, SAMPLING, judged) == [2.5, 2.5]

    def fails(*arguments: Any) -> Any:
        raise KeyError(judged[0].text)

    for quotes in (False, True):
        for failing in (FunctionHintJudge(fails, 1, ONE_RANK, quotes), FunctionRewardJudge(fails, ONE_RANK, quotes)):
            with pytest.raises(VerifierError) as caught:
                failing(4, SAMPLING, judged)
            assert ("reply" in str(caught.value)) == quotes and "log:a: the " in str(caught.value)
    wrong: Any = FunctionHintJudge(lambda *_: 3, 1, ONE_RANK, quotes=False)
    with pytest.raises(VerifierError, match="expected a text or None, got a value of type int"):
        wrong(4, SAMPLING, judged)


def answers_of(rewards: bool, max_length: int = 70) -> tuple[list[Any], Any]:
    """Return the answers of three turns, of which the first has a hint and the second one that does not fit."""
    reader = TurnReader(BUILDER, (STOP,), max_length, "drop", "skip")
    problems = [turn("a", "11", "no"), turn("b", "22", "x" * 40), turn("c", "33", "thanks")]
    turns: Any = reader.read(problems)

    def judge(problem: Problem, text: str, next_state: list[dict[str, Any]]) -> str | None:
        return None if next_state[0]["content"] == "thanks" else next_state[0]["content"]

    by_reward = FunctionRewardJudge(lambda text, problem: float(text == "33"), ONE_RANK, False) if rewards else None
    hinted = HintedTurns(reader, FunctionHintJudge(judge, 0, ONE_RANK, False), by_reward, ONE_RANK)
    return hinted.answers(4, SAMPLING, problems, turns)


def test_a_turn_with_a_hint_is_trained_on_and_the_others_are_skipped():
    [only], metrics = answers_of(rewards=False)
    shown = "".join(map(chr, only.prompts.teacher_prompt))
    assert shown == "ask a\n\n[user's hint / instruction]\nno:" and only.problem.solution == "no"
    assert "".join(map(chr, only.prompts.student_prompt)) == "ask a:"
    assert response_text(only.response, Logged()) == "11" and metrics == {"hints/share": pytest.approx(1 / 3)}


def test_turns_without_a_hint_stay_for_their_rewards_where_these_count():
    answers, metrics = answers_of(rewards=True)
    assert [(one.problem.id, one.hinted, one.reward) for one in answers] == [
        ("a", True, 0.0),
        ("b", False, 0.0),
        ("c", False, 1.0),
    ]
    assert answers[2].prompts.teacher_prompt == answers[2].prompts.student_prompt
    assert metrics == {
        "hints/share": pytest.approx(1 / 3),
        "rewards/mean": pytest.approx(1 / 3),
        "rewards/trained_share": 1.0,
    }
