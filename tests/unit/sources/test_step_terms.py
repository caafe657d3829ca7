# Copyright (c) 2026 the megatron_selfdistill authors. Apache-2.0.
"""The terms that a configuration gives to the answers of a step, and the metrics of their rewards."""

from __future__ import annotations

import math
from dataclasses import replace

import pytest
import torch
import torch.distributed as dist
from characters import ONE_RANK

from megatron_selfdistill.config import load
from megatron_selfdistill.data.contexts import PromptPair
from megatron_selfdistill.data.problems import Problem
from megatron_selfdistill.metrics import Phases
from megatron_selfdistill.rollout.base import Response
from megatron_selfdistill.sources.problem_prompts import Answer
from megatron_selfdistill.sources.reward_metrics import reward_metrics
from megatron_selfdistill.sources.step_terms import StepTerms, signals_of

PROBLEM = Problem("p", ({"role": "user", "content": "1+7"},), "given", "8", "file.jsonl:1")
SAMPLES = "rollout.num_samples=2"
STUDENT, TARGET = [-1.0, -2.0, -0.5, -1.5, -1.0], [-0.5, -3.0, -0.25, -0.5, -1.25]
MU = [-1.0, -2.0, -0.5, -1.5, -2.0]


def answer(group: int, sampled: list[float], correct: bool, hinted: bool = True) -> Answer:
    response = Response([5] * len(sampled), [0.0] * len(sampled), sampled, "stop")
    return Answer(PROBLEM, PromptPair("p", [1], [2]), response, group, float(correct), hinted)


def answers(last_is_hinted: bool = False) -> list[Answer]:
    """Return two groups, whose numbers have a gap, as where another replica's groups lie between them."""
    return [answer(3, MU[:2], True), answer(3, MU[2:4], False), answer(7, MU[4:], True, hinted=last_is_hinted)]


def coefficients(
    *overrides: str, measured: bool = True, last_is_hinted: bool = False, sampled: bool = True, given=None
):
    """Return the coefficients of `answers`; without ``sampled``, nobody knows the probability of their sampling."""
    config = load([SAMPLES, *overrides])
    given = given or answers(last_is_hinted)
    if not sampled:
        given = [
            replace(one, response=replace(one.response, sampled_log_probs=[math.nan] * n))
            for one, n in zip(given, (2, 2, 1), strict=True)
        ]

    def measure(contexts):
        assert measured, "nothing needs the log-probs of this step"
        return torch.tensor(STUDENT, dtype=torch.float64), torch.tensor(TARGET, dtype=torch.float64)

    terms = StepTerms(config, measure, ONE_RANK, Phases()).coefficients(0, given, [])
    return terms(torch.tensor(STUDENT, dtype=torch.float64), torch.arange(5))


@pytest.fixture(autouse=True)
def no_collectives(monkeypatch):
    """Make a sum over ranks return the number of this rank."""
    monkeypatch.setattr(dist, "all_reduce", lambda tensor, group=None: tensor)


def test_rewards_alone_measure_nothing_and_have_no_divergence():
    found = coefficients("recipe=grpo", "policy.advantage_std=none", "policy.clip_high=2", measured=False)
    assert found.divergence.tolist() == [0.0] * 5
    assert found.policy.tolist() == pytest.approx([0.5, 0.5, -0.5, -0.5, 0.0])


def test_teacher_and_rewards_add_up():
    found = coefficients("recipe=opsd_rl", "policy.advantage_std=none", "policy.weight=2", measured=False)
    assert found.divergence.tolist() == [0.25] * 4 + [0.0], "a response without a hint has no teacher"
    assert found.policy.tolist() == pytest.approx([1.0, 1.0, -1.0, -1.0, 0.0])


@pytest.mark.parametrize("signal", ["sampled", "advantage"])
def test_signals_of_the_sampled_token_are_the_measured_log_ratios(signal):
    found = coefficients(
        f"distill.signal={signal}", "distill.weight=0.5", "policy.clip_low=null", "policy.clip_high=null"
    )
    assert found.divergence.tolist() == [0.0] * 5
    assert found.policy.tolist() == pytest.approx([0.25, -0.5, 0.125, 0.5, 0.0])


def test_scope_takes_both_log_probs_and_keeps_responses_without_a_hint():
    found = coefficients("recipe=scope", "loss.normalize=tokens")
    ratio = torch.tensor(1.0).double().exp().item()
    assert found.policy.tolist() == pytest.approx([1.0, 1.0, 0.25, 1.0, ratio])
    by_problem = coefficients("recipe=scope")
    assert by_problem.policy.tolist() == pytest.approx([5 / 2 * value for value in found.policy.tolist()])


def test_uni_opd_shifts_the_responses_with_a_hint():
    found = coefficients("recipe=uni_opd", "policy.clip_low=null", "policy.clip_high=null")
    shift = (0.4 - (-0.25 - 0.625)) / 2
    expected = [0.5 + shift, -1.0 + shift, 0.25 - shift, 1.0 - shift, 0.0]
    assert found.policy.tolist() == pytest.approx(expected)


def test_sod_weighs_the_turns_of_an_episode_beside_the_returns_of_the_episodes():
    published = load(["recipe=sod"])
    assert (published.distill.turn_gain, published.distill.weight, published.policy.weight) == (0.2, 1.0, 1.0)
    first, second, other = (answer(0, mu, right) for mu, right in ((MU[:2], False), (MU[2:4], True), (MU[4:], False)))
    turns = [replace(first, episode=4), replace(second, episode=4, turn=1), replace(other, episode=5)]
    found = coefficients("recipe=sod", "policy.clip_low=null", "policy.clip_high=null", given=turns)
    later, by_return = 0.75 / 0.625, 0.5**0.5
    expected = [by_return + delta for delta in (0.5, -1.0, 0.25 * later, 1.0 * later)]
    ratio = torch.tensor(1.0).double().exp().item()
    assert found.policy.tolist() == pytest.approx([*expected, ratio * (0.75 - by_return)], abs=1e-5)
    assert not found.divergence.any()


def test_skill_sd_pulls_weakly_towards_the_teacher_with_the_skill():
    found = coefficients("recipe=skill_sd", "policy.advantage_std=none", "policy.clip_high=null")
    assert found.divergence.tolist() == [0.0] * 5
    towards = [0.001 * (q - p) for p, q in zip(STUDENT, TARGET, strict=True)]
    advantages = [0.5, 0.5, -0.5, -0.5]
    assert found.policy.tolist() == pytest.approx(
        [a + b for a, b in zip(advantages, towards, strict=False)] + [0.0], abs=1e-12
    )


def test_openclaw_takes_the_measured_probability_of_a_logged_reply_as_that_of_its_sampling():
    found = coefficients("recipe=openclaw", "policy.weight=0.5", sampled=False)
    expected = [0.5 + 0.5, -1.0 + 0.5, 0.25, 1.0, 0.5]
    assert found.policy.tolist() == pytest.approx(expected), "rewards of 1, 0 and 1, the last one without a hint"
    assert not found.clipped.any() and found.divergence.tolist() == [0.0] * 5


def test_rewards_of_logged_replies_beside_the_full_divergence_are_measured_too():
    found = coefficients("recipe=openclaw", "distill.signal=full", sampled=False)
    assert found.divergence.tolist() == [1.0] * 4 + [0.0]
    assert found.policy.tolist() == pytest.approx([1.0, 1.0, 0.0, 0.0, 1.0])


def test_sequences_count_alike_and_first_tokens_are_skipped():
    found = coefficients("loss.normalize=sequences", "loss.skip_first_tokens=1", measured=False)
    assert found.divergence.tolist() == pytest.approx([0.0, 5 / 3 / 2, 0.0, 5 / 3 / 2, 0.0])
    assert found.policy is None


@pytest.mark.parametrize("kind", ["truncated", "truncated_sequence"])
def test_a_correction_multiplies_the_divergence_alone(kind, monkeypatch):
    monkeypatch.setattr("megatron_selfdistill.sources.step_terms.over_last_stage", lambda values, grid: values)
    options = [f"loss.rollout_correction={kind}", "loss.rollout_correction_cap=1.5", "policy.weight=1"]
    options += ["policy.advantage_std=none", "policy.clip_high=null"]
    found = coefficients(*options, measured=False, last_is_hinted=True)
    assert found.divergence.tolist() == pytest.approx([1.0] * 4 + [1.5])
    assert found.policy.tolist() == pytest.approx([0.5, 0.5, -0.5, -0.5, 0.0])


def test_metrics_count_right_answers_mixed_groups_and_trained_answers():
    all_answers = [answer(group, [-1.0], correct) for group, correct in ((0, True), (0, False), (1, True), (2, True))]
    assert reward_metrics(all_answers, all_answers[:3], ONE_RANK) == {
        "rewards/mean": 0.75,
        "rewards/mixed_groups": pytest.approx(1 / 3),
        "rewards/trained_share": 0.75,
    }


def test_turns_of_an_episode_are_numbered_and_answers_without_an_episode_stand_alone():
    one = answer(3, MU[:2], True)
    turns = [replace(one, episode=4), replace(one, episode=4, turn=1), replace(one, episode=9), one, one]
    found = signals_of(turns)
    assert found.episodes.tolist() == [0, 0, 1, 2, 3] and found.turns.tolist() == [0, 1, 0, 0, 0]


def test_groups_are_mixed_where_episodes_have_other_rewards_turn_by_turn():
    def group(*rewards: tuple[float, ...]) -> list[Answer]:
        one = answer(0, MU[:2], True)
        return [
            replace(one, reward=reward, episode=i, turn=turn)
            for i, of_turns in enumerate(rewards)
            for turn, reward in enumerate(of_turns)
        ]

    alike, other = group((0.0, 1.0), (0.0, 1.0)), group((0.0, 1.0), (1.0,))
    assert reward_metrics(alike, alike, ONE_RANK)["rewards/mixed_groups"] == 0.0
    assert reward_metrics(other, other, ONE_RANK)["rewards/mixed_groups"] == 1.0
