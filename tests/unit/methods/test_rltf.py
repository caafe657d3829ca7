# Copyright (c) 2026 the megatron_selfdistill authors. Apache-2.0.
"""RLTF: the prompts of revisions and replies, the advantages of revisions, and the coefficients of all texts."""

from __future__ import annotations

import math
from collections.abc import Sequence
from types import SimpleNamespace
from typing import Any

import pytest
import tiny
import torch
from characters import text_of
from made_methods import made
from term_arrays import signals

from megatron_selfdistill.data.episode_reply import Reply
from megatron_selfdistill.methods.rltf import revision_advantages
from megatron_selfdistill.rollout.sampling import SampleKey
from megatron_selfdistill.sources.rollouts import Rollout

pytestmark = pytest.mark.usefixtures("one_rank")
MU = -1.0  # of every token of `response_of`
SHORT = "method.reply_template='{problem}/{response}/'"
REPLIES = ["method.revision_weight=0", "method.reply_weight=0.2", SHORT]


def turns(*episodes: Sequence[tuple[str, float]]) -> list[Rollout]:
    """Return the turns of episodes of one group, each with texts and rewards of its responses."""
    found, shown = [], tiny.given(60, student="{problem}?")
    for i, responses in enumerate(episodes):
        problem = tiny.problem("1+7", "eight", "8")
        for turn, (text, reward) in enumerate(responses):
            more = {"episode": i, "turn": turn, "key": SampleKey(0, "p", i, turn), "reply": Reply("X2", done=False)}
            found.append(tiny.rollout(text, reward, prompts=shown, problem=problem, **more))
            spoken = ({"role": "assistant", "content": text[:-1]}, {"role": "user", "content": "X2"})
            problem = tiny.problem(solution="eight", answer="8", messages=(*problem.messages, *spoken), reworded=0)
    return found


EPISODES = [[("9$", 0.0), ("8$", 1.0)], [("8$", 1.0)]]


def method_with(*overrides: str, max_length: int = 60) -> Any:
    models = SimpleNamespace(token_signals=lambda contexts: pytest.fail("nothing is measured"))
    options = ["recipe=rltf_sd", "environment.name=replying.Replying", *overrides]
    return made(options, tiny.given(max_length, student="{problem}?"), readers=models)


def added(played: Sequence[Rollout], *overrides: str, max_length: int = 60):
    texts, metrics = method_with(*overrides, max_length=max_length).texts(played, played)
    assert texts[: len(played)] == list(played)
    return texts[len(played) :], metrics


def test_the_last_response_of_an_episode_follows_the_problem_alone_without_a_hint():
    (revision,), metrics = added(turns(*EPISODES))
    assert text_of(revision.prompts.student_prompt) == text_of(revision.prompts.teacher_prompt) == "1+7?:"
    assert text_of(revision.response.token_ids) == "8$" and revision.reward == 1.0
    assert (revision.part, revision.episode, revision.turn, revision.hinted) == ("revision", 0, 1, False)
    assert metrics == {}


def test_a_shown_reply_follows_the_request_for_it_with_the_conversation_so_far_and_the_response():
    (first, last), metrics = added(turns([("9$", 0.0), ("7$", 0.0), ("8$", 1.0)]), *REPLIES)
    assert text_of(first.prompts.student_prompt) == "1+7/9/:" and text_of(first.response.token_ids) == "X2$"
    assert text_of(last.prompts.student_prompt) == "1+7/7/9X2:"
    assert (first.part, first.turn, first.hinted) == ("reply", 0, False)
    assert metrics == {"episodes/replies_trained_share": 1.0}
    found, metrics = added(turns(*EPISODES), *REPLIES, max_length=9)
    assert found == [] and metrics == {"episodes/replies_trained_share": 0.0}, "too long"


def coefficients(*overrides: str, log_prob: float = -2.0, step: int = 0) -> list[list[float]]:
    """Return the coefficients of -log p of each text: three responses, the revision and the reply."""
    played = turns(*EPISODES)
    rollouts = [*played, *added(played, "method.reply_weight=0.2", SHORT)[0]]
    lengths = [len(rollout.response.token_ids) for rollout in rollouts]
    measured = torch.full((sum(lengths),), log_prob).double()
    method = method_with("method.reply_weight=0.2", *overrides)
    found = method.coefficients(step, rollouts, [])(measured, torch.arange(sum(lengths)))
    assert not found.divergence.any()
    return [part.tolist() for part in found.policy.split(lengths)]


def test_responses_have_ratios_and_the_texts_beside_them_have_none():
    first, second, other, revision, reply = coefficients()
    rho = math.exp(-2.0 - MU)
    # The returns of the first turns are 0 + .1 and 1; the second turn is alone; the first rewards have the mean .5.
    assert first == pytest.approx([rho * (0.1 - 0.55)] * 2) and other == pytest.approx([rho * (1 - 0.55)] * 2)
    assert second == [0.0, 0.0]
    assert revision == pytest.approx([0.1 * (1 - 0.5)] * 2) and reply == pytest.approx([0.2] * 3)


@pytest.mark.parametrize(
    ("overrides", "at", "weight"),
    [
        *(("method.revision_warmup_steps=4", {"step": step}, 0.05 * min(step, 4) / 4) for step in (0, 1, 4, 9)),
        ("method.revision_baseline=first_turn", {"log_prob": -6.0}, 0.0),  # unlikely tokens are masked
        ("method.revision_min_log_prob=null", {"log_prob": -6.0}, 0.05),
        ("method.revision_baseline=same_turn", {}, 0.0),  # the only second response is its own mean
    ],
)
def test_the_settings_of_revisions_hold_for_revisions_alone(overrides, at, weight):
    *_, revision, reply = coefficients(overrides, **at)
    assert revision == pytest.approx([weight] * 2) and reply == pytest.approx([0.2] * 3)


def test_a_replica_without_revisions_has_floors_like_those_that_have_some():
    """A response that moves to another replica finds the same columns there."""
    for some in (turns(*EPISODES), []):
        floors = method_with().coefficients(0, some, []).terms.likelihood_floor
        assert floors.tolist() == [-math.inf] * sum(len(rollout.response.token_ids) for rollout in some)


@pytest.mark.parametrize(
    ("baseline", "expected"), [("first_turn", [0.75, -0.25, 0.75, 0.75]), ("same_turn", [0.25, -0.75, 0.25, 0.25])]
)
def test_the_advantage_of_a_second_response_alone_is_that_of_the_paper_or_of_its_code(baseline, expected):
    """The rewards of four episodes are (0, 1), (0, 0), (1, 1) and (0, 1)."""
    four = signals([0, 1, 0, 0, 1, 1, 0, 1], episodes=[0, 0, 1, 1, 2, 2, 3, 3], turns=[0, 1] * 4)
    assert revision_advantages(four, baseline)[1::2].tolist() == expected


def test_an_episode_that_a_right_answer_has_ended_counts_among_the_first_turns_only():
    early = signals([0, 1, 1, 0, 0], episodes=[0, 0, 1, 2, 2], turns=[0, 1, 0, 0, 1])
    assert revision_advantages(early, "first_turn").tolist() == pytest.approx([-1 / 3, 2 / 3, 2 / 3, -1 / 3, -1 / 3])
    assert revision_advantages(early, "same_turn")[[1, 4]].tolist() == [0.5, -0.5]
