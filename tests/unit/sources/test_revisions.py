# Copyright (c) 2026 the megatron_selfdistill authors. Apache-2.0.
"""The texts that RLTF adds to a step: which prompts they follow, and the coefficients of their tokens."""

from __future__ import annotations

import math
from collections.abc import Sequence

import pytest
import torch
import torch.distributed as dist
from characters import ONE_RANK, Characters

from megatron_selfdistill.config import load
from megatron_selfdistill.data.problems import Problem
from megatron_selfdistill.data.prompts import PromptBuilder, PromptTemplates
from megatron_selfdistill.errors import ConfigError
from megatron_selfdistill.metrics import Phases
from megatron_selfdistill.recipes.environments import Reply
from megatron_selfdistill.rollout.base import Response
from megatron_selfdistill.sources.episodes import EpisodeTurn
from megatron_selfdistill.sources.problem_prompts import Answer, GivenSolutions
from megatron_selfdistill.sources.recording import SampleKey
from megatron_selfdistill.sources.revisions import DEFAULT_REPLY_TEMPLATE, Revisions
from megatron_selfdistill.sources.step_terms import StepTerms

PROBLEM = Problem("p", ({"role": "user", "content": "1+7"},), "eight", "8", "file:1")
MU = -1.0


@pytest.fixture(autouse=True)
def one_rank(monkeypatch):
    """Make a sum over ranks return the number of this rank."""
    monkeypatch.setattr(dist, "all_reduce", lambda tensor, group=None: tensor)


def given(max_length: int = 60) -> GivenSolutions:
    templates = PromptTemplates(teacher="{problem}|{solution}", student="{problem}?")
    return GivenSolutions(PromptBuilder(Characters(), templates), max_length, 8, policy="error")


def turns(*episodes: Sequence[tuple[str, float]]) -> list[EpisodeTurn]:
    """Return the turns of episodes of one group, each with texts and rewards of its responses."""
    found = []
    for i, responses in enumerate(episodes):
        problem = PROBLEM
        for turn, (text, reward) in enumerate(responses):
            tokens = [ord(character) for character in text]
            response = Response(tokens, [MU] * len(tokens), [MU] * len(tokens), "stop")
            pair = given().pair(problem)
            answer = Answer(problem, pair, response, group=0, reward=reward, episode=i, turn=turn)
            found.append(EpisodeTurn(SampleKey(0, "p", i, turn), answer, Reply("X2", done=False)))
            spoken = ({"role": "assistant", "content": text[:-1]}, {"role": "user", "content": "X2"})
            problem = Problem("p", (*problem.messages, *spoken), "eight", "8", "file:1", reworded=0)
    return found


def added(played: Sequence[EpisodeTurn], revises=True, reply_template="{problem}/{response}/", max_length=60):
    rule = Revisions(given(max_length), ord("$"), revises, reply_template, ONE_RANK)
    return rule.added(played, [turn.answer for turn in played])


def text(ids: Sequence[int]) -> str:
    return "".join(map(chr, ids))


EPISODES = [[("9$", 0.0), ("8$", 1.0)], [("8$", 1.0)]]


def test_the_last_response_of_an_episode_follows_the_problem_alone_without_a_hint():
    (revision,), metrics = added(turns(*EPISODES), reply_template=None)
    assert text(revision.prompts.student_prompt) == text(revision.prompts.teacher_prompt) == "1+7?:"
    assert text(revision.response.token_ids) == "8$" and revision.reward == 1.0
    assert (revision.part, revision.episode, revision.turn, revision.hinted) == ("revision", 0, 1, False)
    assert metrics == {}


def test_a_shown_reply_follows_the_request_for_it_with_problem_and_response():
    (reply,), metrics = added(turns([("9$", 0.0), ("7$", 0.0), ("8$", 1.0)][:2]), revises=False)
    assert text(reply.prompts.student_prompt) == "1+7/9/:" and text(reply.response.token_ids) == "X2$"
    assert (reply.part, reply.turn, reply.hinted) == ("reply", 0, False)
    assert metrics == {"episodes/replies_trained_share": 1.0}


def test_a_later_reply_follows_the_conversation_so_far():
    _, last = added(turns([("9$", 0.0), ("7$", 0.0), ("8$", 1.0)]), revises=False)[0]
    assert text(last.prompts.student_prompt) == "1+7/7/9X2:"


def test_a_reply_that_is_too_long_is_skipped_and_counted():
    found, metrics = added(turns(*EPISODES), revises=False, max_length=9)
    assert found == [] and metrics == {"episodes/replies_trained_share": 0.0}


def test_the_default_request_shows_problem_and_response():
    (reply,), _ = added(turns(*EPISODES), revises=False, reply_template=DEFAULT_REPLY_TEMPLATE, max_length=200)
    prompt = text(reply.prompts.student_prompt)
    assert "1+7\n\nAttempt: 9\n\n" in prompt and "{" not in prompt and "eight" not in prompt


def coefficients(*overrides: str, log_prob: float = -2.0, step: int = 0) -> list[list[float]]:
    """Return the coefficients of -log p of each text: three responses, the revision and the reply."""
    config = load(["recipe=rltf_sd", "environment.name=replying.Replying", *overrides])
    played = turns(*EPISODES)
    answers = [*(turn.answer for turn in played), *added(played)[0]]
    lengths = [len(answer.response.token_ids) for answer in answers]
    terms = StepTerms(config, lambda contexts: pytest.fail("nothing is measured"), ONE_RANK, Phases())
    found = terms.coefficients(step, answers, [])(
        torch.full((sum(lengths),), log_prob).double(), torch.arange(sum(lengths))
    )
    assert not found.divergence.any()
    return [part.tolist() for part in found.policy.split(lengths)]


def test_responses_have_ratios_and_the_texts_beside_them_have_none():
    first, second, other, revision, reply = coefficients("policy.reply_weight=0.2")
    rho = torch.tensor(-2.0 - MU).double().exp().item()
    # The returns of the first turns are 0 + .1 and 1; the second turn is alone; the first rewards have the mean .5.
    assert first == pytest.approx([rho * (0.1 - 0.55)] * 2) and other == pytest.approx([rho * (1 - 0.55)] * 2)
    assert second == [0.0, 0.0]
    assert revision == pytest.approx([0.1 * (1 - 0.5)] * 2) and reply == pytest.approx([0.2] * 3)


def test_the_weight_of_a_revision_rises_linearly_with_the_steps_and_that_of_a_reply_does_not():
    warm_up, half = ["policy.reply_weight=0.2", "policy.revision_warmup_steps=4"], 0.1 * 0.5 * 0.5
    for step, wanted in ((0, 0.0), (1, half / 2), (2, half), (4, 2 * half), (9, 2 * half)):
        *_, revision, reply = coefficients(*warm_up, step=step)
        assert revision == pytest.approx([wanted] * 2) and reply == pytest.approx([0.2] * 3), step
    with pytest.raises(ConfigError, match=r"needs policy.revision_weight above 0, got 0"):
        load(["policy.revision_warmup_steps=4"])


def test_a_replica_without_revisions_has_floors_like_those_that_have_some():
    """A response that moves to another replica finds the same columns there."""
    config = load(["recipe=rltf_sd", "environment.name=replying.Replying"])
    answers = [turn.answer for turn in turns(*EPISODES)]
    terms = StepTerms(config, lambda contexts: pytest.fail("nothing is measured"), ONE_RANK, Phases())
    for some in (answers, []):
        floors = terms.coefficients(0, some, []).likelihood_floor
        assert floors.tolist() == [-math.inf] * sum(len(answer.response.token_ids) for answer in some)


def test_the_mask_of_unlikely_tokens_holds_for_revisions_alone():
    *_, revision, reply = coefficients("policy.reply_weight=0.2", log_prob=-6.0)
    assert revision == [0.0, 0.0] and reply == pytest.approx([0.2] * 3)
    *_, revision, _ = coefficients("policy.revision_min_log_prob=null", log_prob=-6.0)
    assert revision == pytest.approx([0.05] * 2)


def test_the_baseline_of_the_released_code_is_the_same_turn():
    *_, revision, _ = coefficients("policy.revision_baseline=same_turn")
    assert revision == [0.0, 0.0], "the only second response is its own mean"
