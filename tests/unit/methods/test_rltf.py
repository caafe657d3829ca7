# Copyright (c) 2026 the megatron_selfdistill authors. Apache-2.0.
"""RLTF as pure functions of arrays, the texts that it adds to a step, and the coefficients of their tokens."""

from __future__ import annotations

import math
from collections.abc import Sequence
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from characters import Characters, text_of
from made_methods import given_with, made, response_of
from term_arrays import signals

from megatron_selfdistill.data.episode_reply import Reply
from megatron_selfdistill.data.given_solutions import GivenSolutions
from megatron_selfdistill.data.problems import Problem
from megatron_selfdistill.methods.rltf import revision_advantages
from megatron_selfdistill.rollout.sampling import SampleKey
from megatron_selfdistill.sources.rollouts import Rollout
from megatron_selfdistill.sources.signals import Signals

pytestmark = pytest.mark.usefixtures("one_rank")
ENVIRONMENT = "environment.name=replying.Replying"
PROBLEM = Problem("p", ({"role": "user", "content": "1+7"},), "eight", "8", "file:1")
MU = -1.0  # of every token of `response_of`


def given(max_length: int = 60) -> GivenSolutions:
    return given_with(Characters(), max_length=max_length, student="{problem}?")


def turns(*episodes: Sequence[tuple[str, float]]) -> list[Rollout]:
    """Return the turns of episodes of one group, each with texts and rewards of its responses."""
    found = []
    for i, responses in enumerate(episodes):
        problem = PROBLEM
        for turn, (text, reward) in enumerate(responses):
            pair = given().pair(problem)
            place = {"reward": reward, "episode": i, "turn": turn, "key": SampleKey(0, "p", i, turn)}
            found.append(Rollout(problem, pair, response_of(text), **place, reply=Reply("X2", done=False)))
            spoken = ({"role": "assistant", "content": text[:-1]}, {"role": "user", "content": "X2"})
            problem = Problem("p", (*problem.messages, *spoken), "eight", "8", "file:1", reworded=0)
    return found


def method_with(*overrides: str, max_length: int = 60) -> Any:
    models = SimpleNamespace(token_signals=lambda contexts: pytest.fail("nothing is measured"))
    return made(["recipe=rltf_sd", ENVIRONMENT, *overrides], given(max_length), readers=models)


def added(played: Sequence[Rollout], *overrides: str, max_length: int = 60):
    """Return the texts that the method adds to the responses, and its metrics."""
    texts, metrics = method_with(*overrides, max_length=max_length).texts(played, played)
    assert texts[: len(played)] == list(played)
    return texts[len(played) :], metrics


SHORT = "method.reply_template='{problem}/{response}/'"
REPLIES = ["method.revision_weight=0", "method.reply_weight=0.2"]


EPISODES = [[("9$", 0.0), ("8$", 1.0)], [("8$", 1.0)]]


def test_the_last_response_of_an_episode_follows_the_problem_alone_without_a_hint():
    (revision,), metrics = added(turns(*EPISODES))
    assert text_of(revision.prompts.student_prompt) == text_of(revision.prompts.teacher_prompt) == "1+7?:"
    assert text_of(revision.response.token_ids) == "8$" and revision.reward == 1.0
    assert (revision.part, revision.episode, revision.turn, revision.hinted) == ("revision", 0, 1, False)
    assert metrics == {}


def test_a_shown_reply_follows_the_request_for_it_with_problem_and_response():
    (reply,), metrics = added(turns([("9$", 0.0), ("7$", 0.0), ("8$", 1.0)][:2]), *REPLIES, SHORT)
    assert text_of(reply.prompts.student_prompt) == "1+7/9/:" and text_of(reply.response.token_ids) == "X2$"
    assert (reply.part, reply.turn, reply.hinted) == ("reply", 0, False)
    assert metrics == {"episodes/replies_trained_share": 1.0}


def test_a_later_reply_follows_the_conversation_so_far():
    _, last = added(turns([("9$", 0.0), ("7$", 0.0), ("8$", 1.0)]), *REPLIES, SHORT)[0]
    assert text_of(last.prompts.student_prompt) == "1+7/7/9X2:"


def test_a_reply_that_is_too_long_is_skipped_and_counted():
    found, metrics = added(turns(*EPISODES), *REPLIES, SHORT, max_length=9)
    assert found == [] and metrics == {"episodes/replies_trained_share": 0.0}


def coefficients(*overrides: str, log_prob: float = -2.0, step: int = 0) -> list[list[float]]:
    """Return the coefficients of -log p of each text: three responses, the revision and the reply."""
    played = turns(*EPISODES)
    rollouts = [*played, *added(played, "method.reply_weight=0.2", SHORT)[0]]
    lengths = [len(rollout.response.token_ids) for rollout in rollouts]
    found = method_with(*overrides).coefficients(step, rollouts, [])(
        torch.full((sum(lengths),), log_prob).double(), torch.arange(sum(lengths))
    )
    assert not found.divergence.any()
    return [part.tolist() for part in found.policy.split(lengths)]


def test_responses_have_ratios_and_the_texts_beside_them_have_none():
    first, second, other, revision, reply = coefficients("method.reply_weight=0.2")
    rho = torch.tensor(-2.0 - MU).double().exp().item()
    # The returns of the first turns are 0 + .1 and 1; the second turn is alone; the first rewards have the mean .5.
    assert first == pytest.approx([rho * (0.1 - 0.55)] * 2) and other == pytest.approx([rho * (1 - 0.55)] * 2)
    assert second == [0.0, 0.0]
    assert revision == pytest.approx([0.1 * (1 - 0.5)] * 2) and reply == pytest.approx([0.2] * 3)


def test_the_weight_of_a_revision_rises_linearly_with_the_steps_and_that_of_a_reply_does_not():
    warm_up, half = ["method.reply_weight=0.2", "method.revision_warmup_steps=4"], 0.1 * 0.5 * 0.5
    for step, wanted in ((0, 0.0), (1, half / 2), (2, half), (4, 2 * half), (9, 2 * half)):
        *_, revision, reply = coefficients(*warm_up, step=step)
        assert revision == pytest.approx([wanted] * 2) and reply == pytest.approx([0.2] * 3), step


def test_a_replica_without_revisions_has_floors_like_those_that_have_some():
    """A response that moves to another replica finds the same columns there."""
    for some in (turns(*EPISODES), []):
        floors = method_with().coefficients(0, some, []).terms.likelihood_floor
        assert floors.tolist() == [-math.inf] * sum(len(rollout.response.token_ids) for rollout in some)


def test_the_mask_of_unlikely_tokens_holds_for_revisions_alone():
    *_, revision, reply = coefficients("method.reply_weight=0.2", log_prob=-6.0)
    assert revision == [0.0, 0.0] and reply == pytest.approx([0.2] * 3)
    *_, revision, _ = coefficients("method.revision_min_log_prob=null", log_prob=-6.0)
    assert revision == pytest.approx([0.05] * 2)


def test_the_baseline_of_the_released_code_is_the_same_turn():
    *_, revision, _ = coefficients("method.revision_baseline=same_turn")
    assert revision == [0.0, 0.0], "the only second response is its own mean"


# Four episodes of two turns: the rewards of the first and of the second responses.
FIRST, SECOND = (0.0, 0.0, 1.0, 0.0), (1.0, 0.0, 1.0, 1.0)


def four_episodes() -> Signals:
    rewards = [reward for pair in zip(FIRST, SECOND, strict=True) for reward in pair]
    return signals(rewards, episodes=[0, 0, 1, 1, 2, 2, 3, 3], turns=[0, 1] * 4)


@pytest.mark.parametrize(
    ("baseline", "expected"), [("first_turn", (0.75, -0.25, 0.75, 0.75)), ("same_turn", (0.25, -0.75, 0.25, 0.25))]
)
def test_the_advantage_of_a_second_response_alone_is_that_of_the_paper_or_of_its_code(baseline, expected):
    assert revision_advantages(four_episodes(), baseline)[1::2].tolist() == list(expected)


def test_an_episode_that_a_right_answer_has_ended_counts_among_the_first_turns_only():
    early = signals([0, 1, 1, 0, 0], episodes=[0, 0, 1, 2, 2], turns=[0, 1, 0, 0, 1])
    assert revision_advantages(early, "first_turn").tolist() == pytest.approx([-1 / 3, 2 / 3, 2 / 3, -1 / 3, -1 / 3])
    assert revision_advantages(early, "same_turn")[[1, 4]].tolist() == [0.5, -0.5]
