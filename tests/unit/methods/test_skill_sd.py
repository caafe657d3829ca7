# Copyright (c) 2026 the megatron_selfdistill authors. Apache-2.0.
"""Skill-SD: which skill the teacher sees, how a step changes the bank, and who writes skills."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import replace
from types import SimpleNamespace
from typing import Any

import pytest
from characters import ONE_RANK, Characters
from made_methods import given_with, made, named, response_of

from megatron_selfdistill.data.problems import Problem
from megatron_selfdistill.errors import VerifierError
from megatron_selfdistill.methods import skill_sd
from megatron_selfdistill.methods.skill_sd import Skill, SkillSd, chosen, skill_text
from megatron_selfdistill.rollout.base import Request, Response, SamplingParams
from megatron_selfdistill.sources.rollouts import Rollout

PROBLEM = Problem("p", ({"role": "user", "content": "1+7"},), "", "8", "file.jsonl:1")
OTHER = Problem("q", ({"role": "user", "content": "2+7"},), "", "9", "file.jsonl:2")
GIVEN = given_with(Characters(), max_length=40, student="<{problem}>")
JSON = '{"success_analysis": "carry", "mistake_analysis": " ", "golden_workflow": "digit by digit", "more": 3}'


@pytest.fixture(autouse=True)
def alone(one_rank, monkeypatch):
    monkeypatch.setattr(skill_sd, "gather_items", lambda items, group: list(items))
    monkeypatch.setattr(skill_sd, "max_over_ranks", lambda values, group: list(values))


Bank = dict[str, list[Skill]]


def skills(*uses: tuple[int, float]) -> list[Skill]:
    """Return a skill for each pair of its uses and their total reward."""
    return [Skill(f"skill {i}", i, n, total) for i, (n, total) in enumerate(uses)]


def test_the_shown_skill_has_the_greatest_mean_reward_plus_exploration():
    uses = [(4, 3.0), (1, 0.4), (2, 1.4)]
    worth = [total / n + math.sqrt(math.log(7) / n) for n, total in uses]
    assert max(range(3), key=worth.__getitem__) == 1 == chosen(skills(*uses), 1.0)
    assert chosen(skills(*uses), 0.0) == 0
    assert chosen(skills(*uses), 0.3) == max(
        range(3), key=lambda i: uses[i][1] / uses[i][0] + 0.3 * math.sqrt(math.log(7) / uses[i][0])
    )


def test_skills_without_a_use_come_first_and_the_oldest_one_wins_among_equals():
    assert chosen(skills((1, 1.0), (0, 0.0), (0, 0.0)), 1.0) == 1
    assert chosen(skills((2, 1.0), (2, 1.0)), 1.0) == 0
    assert chosen([], 1.0) is None


def test_a_bank_is_a_value_keeps_so_many_skills_and_no_text_twice(monkeypatch):
    texts = iter(["a", "a", "b"])
    method = before = summarized(monkeypatch, lambda *_: next(texts), {}, keep=2)
    for _ in range(5):  # the bank is full after the third visit: then nobody is asked
        method = method.record([rollout(PROBLEM, 0, "8$", 0.25)])
    assert before.bank == {} and next(texts, None) is None
    assert method.bank == {"p": [Skill("a", 6, 2, 0.5), Skill("b", 6, 2, 0.5)]}
    assert before.restored(method.state_dict()).bank == method.bank


def rollout(problem: Problem, group: int, text: str, reward: float) -> Rollout:
    return Rollout(problem, GIVEN.pair(problem), response_of(text), group, reward)


def method_with(*overrides: str, known: Bank | None = None, **tools: Any) -> SkillSd:
    """Return the method in step 6, with ``known`` as its bank."""
    method = made(
        ["recipe=skill_sd", "rollout.num_samples=2", "seed=5", *overrides], tools.pop("given", GIVEN), **tools
    )
    prepared, _ = replace(method, bank=method.bank if known is None else known).prepare(6, None, None)
    assert isinstance(prepared, SkillSd)
    return prepared


def summarized(monkeypatch: pytest.MonkeyPatch, function: Any, known: Bank, keep: int = 8, **tools: Any) -> SkillSd:
    overrides = [f"method.summarizer={named(monkeypatch, function)}", f"method.keep={keep}"]
    return method_with(*overrides, known=known, **tools)


def test_a_step_shows_credits_and_writes_skills(monkeypatch):
    asked: list[Any] = []

    def summarize(problem: Problem, text: str, reward: float) -> str | None:
        asked.append((text, reward))
        return f"new {problem.id}" if reward else None

    prompts = summarized(monkeypatch, summarize, {"p": skills((3, 0.0), (1, 1.0))})
    assert prompts.prepare(6, None, None)[1] == {"skills/count": 2.0, "skills/problems": 1.0}
    rollouts = [rollout(PROBLEM, 0, "7$", 0.0), rollout(PROBLEM, 0, "8$", 1.0), rollout(OTHER, 1, "1$", 0.0)]
    chosen, metrics = prompts.select(6, rollouts)
    assert [one.problem.solution if one.hinted else None for one in chosen] == ["skill 1", "skill 1", None]
    assert "".join(map(chr, chosen[0].prompts.teacher_prompt)) == "1+7|skill 1:"
    assert all("skill" not in "".join(map(chr, one.prompts.student_prompt)) for one in chosen)
    assert metrics == {"hints/share": pytest.approx(2 / 3)}
    after = prompts.record(rollouts)
    assert asked == [("8", 1.0), ("1", 0.0)], "the best response of each visit"
    assert after.bank == {"p": [Skill("skill 0", 0, 3, 0.0), Skill("skill 1", 1, 2, 1.5), Skill("new p", 6)]}
    assert prompts.bank["p"][1].uses == 1, "old prompts stay as they were"
    fresh = method_with()
    assert fresh.restored(after.state_dict()).bank == after.bank and fresh.restored({"skills": None}) is fresh


def test_visits_of_all_replicas_change_the_bank_in_the_order_of_the_global_batch(monkeypatch):
    """The other replica has the visits 0 and 2 of the global batch, and this one visit 1."""
    others = [(2, "p", 1.0, "third"), (0, "p", 0.5, "first")]
    monkeypatch.setattr(skill_sd, "gather_items", lambda items, group: [*items, *others])
    grid = SimpleNamespace(**(vars(ONE_RANK) | {"dp_rank": 1, "dp_size": 2}))
    prompts = summarized(monkeypatch, lambda *_: "second", {"p": skills((1, 1.0))}, grid=grid)
    after = prompts.record([rollout(PROBLEM, 0, "8$", 0.0)])
    assert [skill.text for skill in after.bank["p"]] == ["skill 0", "first", "second", "third"]
    assert (after.bank["p"][0].uses, after.bank["p"][0].total_reward) == (4, 2.5)


def test_the_last_response_of_an_episode_stands_for_its_rewards(monkeypatch):
    asked: list[float | None] = []
    prompts = summarized(monkeypatch, lambda problem, text, reward: asked.append(reward) or "s", {})
    turns = [(0, 0, 0.25), (0, 1, 0.5), (1, 0, 0.5)]
    rollouts = [replace(rollout(PROBLEM, 0, "8$", r), episode=e, turn=t) for e, t, r in turns]
    after = prompts.record(rollouts)
    assert asked == [0.75]
    reward = replace(prompts, bank=after.bank).record(rollouts).bank["p"][0].total_reward
    assert reward == (0.75 + 0.5) / 2


@pytest.mark.parametrize(
    ("reply", "skill"),
    [
        (JSON, "success_analysis: carry\ngolden_workflow: digit by digit"),
        (
            "{<think>}</think>Here:\n```json\n" + JSON + "\n```",
            "success_analysis: carry\ngolden_workflow: digit by digit",
        ),
        ('{"success_analysis": "carry"}', None),
        ("carry the one", None),
        ("{not json}", None),
        (JSON.replace('"carry"', "1"), None),
        ('{"success_analysis": "", "mistake_analysis": "", "golden_workflow": ""}', None),
        ("} {", None),
    ],
)
def test_a_skill_of_the_model_is_a_json_object_with_three_texts(reply, skill):
    assert skill_text(reply) == skill


class Sampler:
    """A sampler that rollouts with ``reply``, and keeps its requests."""

    def __init__(self, reply: str) -> None:
        self.reply, self.requests, self.versions = reply, [], []  # type: ignore[var-annotated]

    def update_weights(self, version: int) -> None:
        self.versions.append(version)

    def generate(self, requests: Sequence[Request], params: SamplingParams) -> list[Response]:
        self.requests += requests
        return [response_of(self.reply) for _ in requests]


def model_skills(reply: str, rollouts: list[Rollout], max_length: int = 80) -> tuple[list[str | None], Sampler]:
    """Return the skills that the model writes about the rollouts, and its sampler."""
    sampler: Any = Sampler(reply)
    given = replace(GIVEN, max_length=max_length)
    template = "method.summarizer_template='{reward} {problem} {response}?'"
    method = method_with("rollout.max_new_tokens=8", template, given=given, sampler=sampler)
    return method._summaries(rollouts), sampler


def test_the_model_is_asked_about_problem_response_and_reward_with_its_present_weights():
    rollouts = [rollout(PROBLEM, 0, "8$", 1.0), rollout(PROBLEM, 1, "{x}$", 0.0)]
    written, sampler = model_skills(JSON + "$", rollouts)
    assert written == ["success_analysis: carry\ngolden_workflow: digit by digit"] * 2
    assert ["".join(map(chr, request.prompt)) for request in sampler.requests] == ["1 1+7 8?:", "0 1+7 {x}?:"]
    assert sampler.versions == [6] and len({request.seed for request in sampler.requests}) == 2
    _, other = model_skills(JSON + "$", rollouts[1:])
    assert other.requests == sampler.requests[1:], "the random stream does not depend on the layout"


def test_an_answer_without_an_end_and_a_request_that_is_too_long_are_no_skill():
    rollouts = [rollout(PROBLEM, 0, "8$", 1.0)]
    assert model_skills(JSON, rollouts)[0] == [None]
    written, sampler = model_skills(JSON + "$", rollouts, max_length=16)
    assert written == [None] and not sampler.requests


def test_a_function_writes_skills_and_white_space_is_none(monkeypatch):
    def summarize(problem: Problem, text: str, reward: float) -> str | None:
        return {"8": f"{problem.id} {reward:g}", "9": " ", "7": None}[text]

    rollouts = [rollout(PROBLEM, i, text, 1.0) for i, text in enumerate(("8$", "9$", "7$"))]
    assert summarized(monkeypatch, summarize, {})._summaries(rollouts) == ["p 1", None, None]
    with pytest.raises(VerifierError, match="the summarizer failed with ValueError: expected a text or None"):
        summarized(monkeypatch, lambda *_: 3, {})._summaries(rollouts)
