# Copyright (c) 2026 the megatron_selfdistill authors. Apache-2.0.
"""Skills as hints: the bank of Skill-SD and who writes into it, and the gate of SKALD's cards."""

from __future__ import annotations

import math
from dataclasses import replace
from types import SimpleNamespace
from typing import Any

import pytest
import tiny
from characters import ONE_RANK, text_of
from made_methods import TextSampler, made, named, shown
from term_arrays import signals

from megatron_selfdistill.data.problems import Problem
from megatron_selfdistill.errors import VerifierError
from megatron_selfdistill.methods import skill_sd
from megatron_selfdistill.methods.skald import mean_gain, states_answer
from megatron_selfdistill.methods.skill_sd import Skill, SkillSd, chosen, skill_text
from megatron_selfdistill.rollout.sampling import SampleKey
from megatron_selfdistill.sources.rollouts import Rollout
from megatron_selfdistill.sources.signals import signals_of

STEP = 6
PROBLEM, OTHER = tiny.problem("1+7", "", "8"), tiny.problem("2+7", "", "9", id="q")
GIVEN = tiny.given(student="<{problem}>")
JSON = '{"success_analysis": "carry", "mistake_analysis": " ", "golden_workflow": "digit by digit", "more": 3}'
WRITTEN = "success_analysis: carry\ngolden_workflow: digit by digit"


@pytest.fixture(autouse=True)
def alone(one_rank, monkeypatch):
    monkeypatch.setattr(skill_sd, "gather_items", lambda items, group: list(items))
    monkeypatch.setattr(skill_sd, "max_over_ranks", lambda values, group: list(values))


def skills(*uses: tuple[int, float]) -> list[Skill]:
    return [Skill(f"skill {i}", i, n, total) for i, (n, total) in enumerate(uses)]


@pytest.mark.parametrize(("exploration", "best"), [(1.0, 1), (0.0, 0), (0.3, None)])
def test_the_shown_skill_has_the_greatest_mean_reward_plus_exploration(exploration, best):
    uses = [(4, 3.0), (1, 0.4), (2, 1.4)]
    worth = [total / n + exploration * math.sqrt(math.log(7) / n) for n, total in uses]
    found = chosen(skills(*uses), exploration)
    assert found == max(range(3), key=worth.__getitem__) and best in (found, None)


def test_skills_without_a_use_come_first_and_the_oldest_one_wins_among_equals():
    assert chosen(skills((1, 1.0), (0, 0.0), (0, 0.0)), 1.0) == 1
    assert chosen(skills((2, 1.0), (2, 1.0)), 1.0) == 0
    assert chosen([], 1.0) is None


def rollout(text: str, reward: float, group: int = 0, problem: Problem = PROBLEM, **fields: Any) -> Rollout:
    return tiny.rollout(text, reward, group, prompts=GIVEN, problem=problem, **fields)


def method_with(*overrides: str, known: dict[str, list[Skill]] | None = None, **tools: Any) -> SkillSd:
    """Return the method in step 6, with ``known`` as its bank."""
    keys = ["recipe=skill_sd", "rollout.num_samples=2", "seed=5", *overrides]
    method = replace(made(keys, tools.pop("given", GIVEN), **tools), bank=known or {})
    prepared, _ = method.prepare(STEP, None, None)
    assert isinstance(prepared, SkillSd)
    return prepared


def summarized(monkeypatch: pytest.MonkeyPatch, function: Any, known: Any = None, keep: int = 8, **tools: Any):
    overrides = [f"method.summarizer={named(monkeypatch, function)}", f"method.keep={keep}"]
    return method_with(*overrides, known=known, **tools)


def test_a_bank_is_a_value_keeps_so_many_skills_and_no_text_twice(monkeypatch):
    texts = iter(["a", "a", "b"])
    method = before = summarized(monkeypatch, lambda *_: next(texts), keep=2)
    for _ in range(5):  # the bank is full after the third visit: then nobody is asked
        method = method.record([rollout("8$", 0.25)])
    assert before.bank == {} and next(texts, None) is None
    assert method.bank == {"p": [Skill("a", 6, 2, 0.5), Skill("b", 6, 2, 0.5)]}
    assert before.restored(method.state_dict()).bank == method.bank
    assert before.restored({"skills": None}) is before


def test_a_step_shows_credits_and_writes_skills(monkeypatch):
    asked: list[Any] = []

    def summarize(problem: Problem, text: str, reward: float) -> str | None:
        asked.append((text, reward))
        return f"new {problem.id}" if reward else None

    prompts = summarized(monkeypatch, summarize, {"p": skills((3, 0.0), (1, 1.0))})
    assert prompts.prepare(STEP, None, None)[1] == {"skills/count": 2.0, "skills/problems": 1.0}
    rollouts = [rollout("7$", 0.0), rollout("8$", 1.0), rollout("1$", 0.0, 1, OTHER)]
    chosen, metrics = prompts.select(6, rollouts)
    assert [one.problem.solution if one.hinted else None for one in chosen] == ["skill 1", "skill 1", None]
    assert shown(chosen[0]) == "1+7|skill 1:" and metrics == {"hints/share": pytest.approx(2 / 3)}
    assert all("skill" not in text_of(one.prompts.student_prompt) for one in chosen)
    after = prompts.record(rollouts)
    assert asked == [("8", 1.0), ("1", 0.0)], "the best response of each visit"
    assert after.bank == {"p": [Skill("skill 0", 0, 3, 0.0), Skill("skill 1", 1, 2, 1.5), Skill("new p", 6)]}
    assert prompts.bank["p"][1].uses == 1, "old prompts stay as they were"


def test_visits_of_all_replicas_change_the_bank_in_the_order_of_the_global_batch(monkeypatch):
    """The other replica has the visits 0 and 2 of the global batch, and this one visit 1."""
    others = [(2, "p", 1.0, "third"), (0, "p", 0.5, "first")]
    monkeypatch.setattr(skill_sd, "gather_items", lambda items, group: [*items, *others])
    grid = SimpleNamespace(**(vars(ONE_RANK) | {"dp_rank": 1, "dp_size": 2}))
    prompts = summarized(monkeypatch, lambda *_: "second", {"p": skills((1, 1.0))}, grid=grid)
    bank = prompts.record([rollout("8$", 0.0)]).bank["p"]
    assert [skill.text for skill in bank] == ["skill 0", "first", "second", "third"]
    assert (bank[0].uses, bank[0].total_reward) == (4, 2.5)


def test_the_last_response_of_an_episode_stands_for_its_rewards(monkeypatch):
    asked: list[float | None] = []
    prompts = summarized(monkeypatch, lambda problem, text, reward: asked.append(reward) or "s")
    turns = [(0, 0, 0.25), (0, 1, 0.5), (1, 0, 0.5)]
    rollouts = [rollout("8$", reward, episode=episode, turn=turn) for episode, turn, reward in turns]
    after = prompts.record(rollouts)
    assert asked == [0.75]
    assert replace(prompts, bank=after.bank).record(rollouts).bank["p"][0].total_reward == (0.75 + 0.5) / 2


@pytest.mark.parametrize(
    ("reply", "skill"),
    [
        (JSON, WRITTEN),
        ("{<think>}</think>Here:\n```json\n" + JSON + "\n```", WRITTEN),
        ('{"success_analysis": "carry"}', None),
        ("carry the one", None),
        (JSON.replace('"carry"', "1"), None),
        ('{"success_analysis": "", "mistake_analysis": "", "golden_workflow": ""}', None),
    ],
)
def test_a_skill_of_the_model_is_a_json_object_with_three_texts(reply, skill):
    assert skill_text(reply) == skill


def test_the_model_is_asked_about_problem_response_and_reward_and_an_answer_without_an_end_is_no_skill():
    def model_skills(rollouts: list[Rollout], *replies: str, max_length: int = 80) -> tuple[list[str | None], Any]:
        sampler = TextSampler(6, *replies)
        options = ["rollout.max_new_tokens=8", "method.summarizer_template='{reward} {problem} {response}?'"]
        method = method_with(*options, given=replace(GIVEN, max_length=max_length), sampler=sampler)
        return method._summaries(rollouts), sampler.requests

    rollouts = [rollout("8$", 1.0), rollout("{x}$", 0.0, 1)]
    written, requests = model_skills(rollouts, JSON + "$", JSON + "$")
    assert written == [WRITTEN] * 2 and len({request.seed for request in requests}) == 2
    assert [text_of(request.prompt) for request in requests] == ["1 1+7 8?:", "0 1+7 {x}?:"]
    assert model_skills(rollouts[1:], JSON + "$")[1] == requests[1:], "the stream does not depend on the layout"
    assert model_skills(rollouts[:1], JSON)[0] == [None]
    assert model_skills(rollouts[:1], max_length=16) == ([None], []), "the request is too long"


def test_a_function_writes_skills_and_white_space_is_none(monkeypatch):
    rollouts = [rollout(text, 1.0, i) for i, text in enumerate(("8$", "9$", "7$"))]
    texts = {"8": "new", "9": " ", "7": None}
    written = summarized(monkeypatch, lambda problem, text, reward: texts[text])._summaries(rollouts)
    assert written == ["new", None, None]
    with pytest.raises(VerifierError):
        summarized(monkeypatch, lambda *_: 3)._summaries(rollouts)


# SKALD: a card is shown where responses behind it are better; test_recipes.py has the loss of its target.


def group(number: int, *rewards: float, card: str = "carry") -> list[Any]:
    asked = tiny.problem("1+7", card, "8", id=f"p{number}")
    keys = [SampleKey(STEP, asked.id, i) for i in range(len(rewards))]
    return [tiny.rollout("8$", r, number, problem=asked, key=key) for r, key in zip(rewards, keys, strict=True)]


def skald(sampler: Any = None, *overrides: str) -> Any:
    return made(["recipe=skald", "method.num_hinted=2", "seed=5", *overrides], tiny.given(60), sampler=sampler)


def test_the_gate_of_a_problem_opens_where_the_hinted_responses_are_better():
    """The card helps with the first problem, does nothing for the second, and harms with the third."""
    plain = [*group(0, 0, 1), *group(1, 1, 0), *group(2, 1, 1)]
    sampler = TextSampler(STEP, "8$", "8$", "8$", "7$", "7$", "8$")
    chosen, metrics = skald(sampler).select(STEP, plain)
    assert [one.hinted for one in chosen] == [True] * 2 + [False] * 4
    assert [one.response for one in chosen] == [one.response for one in plain], "the hinted responses train nothing"
    assert all(one.prompts.teacher_prompt == one.prompts.student_prompt for one in chosen[2:])
    assert metrics == {"hints/share": pytest.approx(2 / 6), "skills/advantage": pytest.approx((0.5 + 0 - 0.5) / 3)}
    assert {text_of(one.prompt) for one in sampler.requests} == {"1+7|carry:"}
    assert len({one.seed for one in sampler.requests}) == 6
    assert mean_gain([1.0, 0.0, 1.0], [0.5, 0.0]) == pytest.approx(2 / 3 - 1 / 4)


def test_a_card_that_states_the_answer_is_not_shown():
    plain = [*group(0, 0, 0, card="it is 8"), *group(1, 0, 0)]
    chosen, metrics = skald(TextSampler(STEP, "8$", "8$")).select(STEP, plain)
    assert [one.hinted for one in chosen] == [False, False, True, True] and metrics["skills/advantage"] == 1
    shown, _ = skald(TextSampler(STEP, *["8$"] * 4), "method.filters_answers=false").select(STEP, plain)
    assert all(one.hinted for one in shown)
    stated = [("so it is 12.", "12"), ("= -3", " -3 "), ("x^2+1", "x^2+1")]
    unstated = [("S12", "12"), ("112", "12"), ("anything", ""), ("None", None)]
    assert [states_answer(*pair) for pair in stated + unstated] == [True] * 3 + [False] * 4


def test_a_truncated_hinted_response_is_wrong_and_a_replica_without_problems_takes_part():
    chosen, _ = skald(TextSampler(STEP, "8", "8")).select(STEP, group(0, 0, 0))
    assert not any(one.hinted for one in chosen)
    assert skald(TextSampler(STEP)).select(STEP, []) == ([], {"hints/share": 0, "skills/advantage": 0})


def test_the_terms_are_the_rewards_and_the_divergence_where_the_gate_is_open():
    rewards, hinted = [1.0, 0.0, 0.0, 0.0], [False, False, True, True]
    both = signals(rewards, groups=[0, 0, 1, 1], lengths=[2, 1, 1, 2], hinted=hinted)
    terms = skald(None, "method.distill_weight=0.5", "method.advantage_std=none").terms(STEP, [], both)
    assert terms.divergence.tolist() == [0, 0, 0, 0.5, 0.5, 0.5], "a group that is all wrong has a signal"
    assert terms.advantage.tolist() == [0.5, 0.5, -0.5, 0, 0, 0] and not terms.sampled_kl.any()
    plain = [replace(one, hinted=False) for one in group(0, 1, 0)]
    assert not skald().terms(STEP, plain, signals_of(plain)).divergence.any()
