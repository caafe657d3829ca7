# Copyright (c) 2026 the megatron_selfdistill authors. Apache-2.0.
"""RLTF as pure functions of arrays, against the numbers of its formula, and the constants of its recipes."""

from __future__ import annotations

import math

import pytest
import torch

from megatron_selfdistill.config import load
from megatron_selfdistill.errors import ConfigError
from megatron_selfdistill.recipes.advantages import group_advantages
from megatron_selfdistill.recipes.ratio_terms import RatioTerms
from megatron_selfdistill.recipes.rltf import extra_likelihood, likelihood_floors, revision_advantages
from megatron_selfdistill.recipes.signals import Signals, Terms

# Four episodes of two turns: the rewards of the first and of the second responses.
FIRST, SECOND = (0.0, 0.0, 1.0, 0.0), (1.0, 0.0, 1.0, 1.0)


def tensor(*values: float) -> torch.Tensor:
    return torch.tensor(values, dtype=torch.float64)


def signals(rewards, episodes, turns, groups=None) -> Signals:
    number = len(rewards)
    return Signals(
        lengths=torch.ones(number, dtype=torch.int64),
        groups=torch.tensor(groups or [0] * number),
        rewards=tensor(*rewards),
        hinted=torch.zeros(number, dtype=torch.bool),
        privileged=torch.zeros(number, dtype=torch.bool),
        sampled_log_prob=torch.zeros(number, dtype=torch.float64),
        episodes=torch.tensor(episodes),
        turns=torch.tensor(turns),
    )


def four_episodes() -> Signals:
    rewards = [reward for pair in zip(FIRST, SECOND, strict=True) for reward in pair]
    return signals(rewards, [0, 0, 1, 1, 2, 2, 3, 3], [0, 1] * 4)


@pytest.mark.parametrize(
    ("baseline", "expected"),
    [("first_turn", (0.75, -0.25, 0.75, 0.75)), ("same_turn", (0.25, -0.75, 0.25, 0.25))],
)
def test_the_advantage_of_a_second_response_alone_is_that_of_the_paper_or_of_its_code(baseline, expected):
    second = revision_advantages(four_episodes(), baseline)[1::2]
    assert second.tolist() == list(expected)
    weights = extra_likelihood(second, torch.ones(4, dtype=torch.bool), revision_weight=0.1, reply_weight=7.0)
    assert weights.tolist() == pytest.approx([0.1 * value for value in expected], abs=1e-16)


def test_the_returns_of_both_turns_are_centred_with_a_discount():
    found = group_advantages(four_episodes(), "none", "turn", 0.1)
    assert found[::2].tolist() == pytest.approx([-0.225, -0.325, 0.775, -0.225], abs=1e-15)
    assert found[1::2].tolist() == pytest.approx([0.25, -0.75, 0.25, 0.25], abs=1e-15)


def test_an_episode_that_a_right_answer_has_ended_counts_among_the_first_turns_only():
    early = signals([0, 1, 1, 0, 0], [0, 0, 1, 2, 2], [0, 1, 0, 0, 1])
    assert revision_advantages(early, "first_turn").tolist() == pytest.approx([-1 / 3, 2 / 3, 2 / 3, -1 / 3, -1 / 3])
    assert revision_advantages(early, "same_turn")[[1, 4]].tolist() == [0.5, -0.5]


def test_groups_have_baselines_of_their_own():
    both = signals([1, 0, 0, 1], [0, 0, 1, 1], [0, 1, 0, 1], groups=[0, 0, 1, 1])
    assert revision_advantages(both, "first_turn").tolist() == [0.0, -1.0, 0.0, 1.0]


def test_a_reply_has_its_weight_whatever_the_rewards():
    weights = extra_likelihood(tensor(0.75, 0.75), torch.tensor([True, False]), revision_weight=0.1, reply_weight=0.2)
    assert weights.tolist() == pytest.approx([0.075, 0.2])


def test_unlikely_tokens_of_a_revision_are_masked_and_those_of_a_reply_are_not():
    floors = likelihood_floors(torch.tensor([True, True, True, False]), -5.0)
    assert floors.tolist() == [-5.0, -5.0, -5.0, -math.inf]
    assert likelihood_floors(torch.tensor([True]), None).tolist() == [-math.inf]
    log_prob = tensor(-4.999, -5.0, -5.001, -9.0)
    terms = Terms.of(tensor()).extended(torch.full((4,), 0.3, dtype=torch.float64))
    rule = RatioTerms(terms, tensor(-1, -1, -1, 0), None, None, None, likelihood_floor=floors)
    found = rule(log_prob, torch.arange(4))
    assert found.policy.tolist() == [0.3, 0.3, 0.0, 0.3] and not found.divergence.any()


def test_a_token_of_a_revision_has_no_ratio_to_the_prompt_with_the_reply():
    terms = Terms.of(tensor()).extended(tensor(0.3))
    for mu in (-0.1, -4.0):
        found = RatioTerms(terms, tensor(mu), None, None, None)(tensor(-2.0), torch.arange(1))
        assert found.policy.tolist() == [0.3]


ENVIRONMENT = "environment.name=replying.Replying"


@pytest.mark.parametrize("recipe", ["rltf_sd", "rltf_fm"])
def test_the_recipes_ask_for_an_environment(recipe):
    with pytest.raises(ConfigError, match=r"environment.name is none: set environment.name, or unset"):
        load([f"recipe={recipe}"])
    with pytest.raises(ConfigError, match=r"environment.max_turns of at least 2 and policy.weight above 0, got .* 1 "):
        load([f"recipe={recipe}", ENVIRONMENT, "environment.max_turns=1"])


@pytest.mark.parametrize("recipe", ["rltf_sd", "rltf_fm"])
def test_the_recipes_have_the_published_constants(recipe):
    config = load([f"recipe={recipe}", ENVIRONMENT])
    policy = config.policy
    assert config.objective == "policy_gradient" and config.environment.max_turns == 2
    assert (config.data.global_batch_size, config.rollout.num_samples) == (32, 8)
    assert (policy.weight, policy.credit, policy.discount, policy.advantage_std) == (1.0, "turn", 0.1, "none")
    assert policy.clip_low is None and policy.clip_high is None and policy.ratio_cap is None
    assert (policy.revision_weight, policy.reply_weight) == ((0.1, 0.0) if recipe == "rltf_sd" else (0.0, 0.1))
    assert (policy.revision_baseline, policy.revision_min_log_prob) == ("first_turn", -5.0)
