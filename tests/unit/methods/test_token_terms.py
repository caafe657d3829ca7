# Copyright (c) 2026 the megatron_selfdistill authors. Apache-2.0.
"""The terms of the methods that are functions of a step's signals, against the published rules in plain Python."""

from __future__ import annotations

import math
from itertools import pairwise
from types import SimpleNamespace

import pytest
import tiny
import torch
from made_methods import made
from term_arrays import signals, tensor

from megatron_selfdistill.methods import tip
from megatron_selfdistill.methods.beta_opsd import credited, returns_to_go
from megatron_selfdistill.methods.opsa import opsa
from megatron_selfdistill.methods.parts.terms import group_advantages
from megatron_selfdistill.methods.pi_distill import pi_distill
from megatron_selfdistill.methods.pw_opsd import position_weights
from megatron_selfdistill.methods.scope import scope
from megatron_selfdistill.methods.sod import sod, turn_weights
from megatron_selfdistill.methods.tip import importance_weights
from megatron_selfdistill.methods.uni_opd import balanced, margin_shift, uni_opd
from megatron_selfdistill.sources.signals import Clip, Signals
from megatron_selfdistill.sources.step_terms import RatioTerms

LENGTHS = [[1] * 11, [11], [1, 2, 8], [8, 1, 1, 1], [3, 4, 4]]
"""The lengths of the responses of a step, of eleven tokens together."""


def given(lengths: list[int], **more) -> Signals:
    return signals([0.0] * len(lengths), groups=[2 * i for i in range(len(lengths))], lengths=lengths, **more)


def alone(terms, name: str) -> list[float]:
    """Return one term of each token; the others must be zero."""
    others = {"divergence", "advantage", "sampled_kl", "likelihood"} - {name}
    assert not any(getattr(terms, other).any() for other in others)
    return getattr(terms, name).tolist()


# beta-OPSD: the credit of later tokens is a plain sum.


@pytest.mark.parametrize("lengths", LENGTHS, ids=str)
@pytest.mark.parametrize("discount", [0.0, 0.5, 1.0])
def test_the_credit_of_later_tokens_is_their_discounted_sum_within_the_response(lengths, discount):
    values, start, sums = [0.5, -1.0, 0.25, 2.0, -3.0, 0.0, 0.75, 1e-9, -0.125, 4.0, 1.5], 0, []
    for length in lengths:
        own = values[start : start + length]
        sums += [sum(discount ** (j - i) * own[j] for j in range(i, length)) for i in range(length)]
        start += length
    found = returns_to_go(given(lengths), tensor(*values), discount)
    torch.testing.assert_close(found, tensor(*sums), rtol=1e-13, atol=1e-14)


def test_beta_opsd_has_log_ratios_of_target_and_sampler_and_0_without_a_hint():
    mu, q = [-1.0, -2.0, -0.5, -1.0, -3.0, -0.25], [-0.5, -3.0, float("nan"), -9.0, 0.0, -2.25]
    terms = credited(given([2, 3, 1], hinted=[True, False, True], mu=mu, q=q), weight=2.0, discount=0.5)
    assert alone(terms, "advantage") == pytest.approx([2 * (0.5 + 0.5 * -1.0), -2.0, 0.0, 0.0, 0.0, -4.0], abs=1e-15)


# OPSA: a penalty for tokens that the sampler found unlikely.


@pytest.mark.parametrize("lengths", [[1] * 7, [7], [1, 5, 1]])
@pytest.mark.parametrize("penalty", [1.0, 0.125])
def test_only_tokens_below_the_threshold_get_the_advantage(lengths, penalty):
    at = math.log(0.25)
    mu = [at, math.nextafter(at, -math.inf), math.nextafter(at, 0.0), 0.0, -1e-300, -745.0, -2.0]
    terms = opsa(given(lengths, mu=mu), threshold=0.25, penalty=penalty)
    assert terms.advantage.dtype == torch.float64
    assert alone(terms, "advantage") == [0.0, -penalty, 0.0, 0.0, 0.0, -penalty, -penalty]
    assert opsa(signals([], mu=[]), threshold=0.1, penalty=1.0).advantage.tolist() == []


# PW-OPSD: the weight of each position of a response.


def position_weights_of(lengths: list[int], least: float, midpoint: float, width: float) -> list[float]:
    """Return the published weights: 1-based tokens, and each token's middle as a share of its own response."""
    places = [((number - 0.5) / length - midpoint) / width for length in lengths for number in range(1, length + 1)]
    return [least + (1 - least) * (1 / (1 + math.exp(-x)) if x > -700 else 0.0) for x in places]


@pytest.mark.parametrize("lengths", LENGTHS, ids=str)
@pytest.mark.parametrize("schedule", [(0.25, 0.3, 0.1), (0.0, 0.0, 1.0), (0.5, 1.0, 0.02), (0.1, 0.5, 1e-6)], ids=str)
def test_weights_of_positions_are_those_of_the_paper_in_every_response(lengths, schedule):
    found = position_weights(given(lengths), **dict(zip(("least", "midpoint", "width"), schedule, strict=True)))
    torch.testing.assert_close(found, tensor(*position_weights_of(lengths, *schedule)), rtol=1e-12, atol=1e-15)


def test_pw_opsd_gives_tokens_without_a_hint_no_divergence_and_reads_its_settings():
    method = made(["recipe=pw_opsd", "method.least_weight=0.5", "method.midpoint=0.4"], tiny.given())
    terms = method.terms(0, [], given([2, 3, 1], hinted=[True, False, True]))
    wanted = position_weights_of([2, 3, 1], 0.5, 0.4, 0.1)
    assert alone(terms, "divergence") == pytest.approx([*wanted[:2], 0.0, 0.0, 0.0, wanted[5]], abs=1e-15)
    assert method.weighs_tokens
    none = torch.tensor([], dtype=torch.int64)
    empty = Signals(none, none, none.double(), none.bool(), none.bool(), none.double())
    assert position_weights(empty, least=0.25, midpoint=0.3, width=0.1).tolist() == [], "a replica without responses"


# TIP: the tokens with the highest scores.

ENTROPIES, DIVERGENCES = [2.0, 0.0, 1.0, 0.1, 0.0, 0.4], [0.0, 3.0, 0.3, 0.0, 0.0, 1.5]


def place(values: list[float], value: float) -> float:
    """Return the place of a value between the smallest and the largest of the finite ones."""
    low, high = (bound(each for each in values if math.isfinite(each)) for bound in (min, max))
    return 0.0 if high == low else min(1.0, (value - low) / (high - low))


def importance_of(entropies: list[float], divergences: list[float], share: float, score: str) -> list[float]:
    """Return the weights of the tokens with the highest scores: one loop per line of the published rule."""
    scores = []
    for one, other in zip(entropies, divergences, strict=True):
        h, d = place(entropies, one), place(divergences, other)
        scores.append({"soft_or": 1 - (1 - h) * (1 - d), "entropy": h, "divergence": d}[score])
    limit = sorted(scores, reverse=True)[max(1, math.floor(share * len(scores))) - 1]
    chosen = [each >= limit - 1e-15 for each in scores]
    return [len(scores) / sum(chosen) if one else 0.0 for one in chosen]


@pytest.mark.parametrize("score", ["soft_or", "entropy", "divergence"])
@pytest.mark.parametrize("share", [0.0, 0.34, 0.5, 0.99, 1.0])
def test_weights_of_tokens_are_those_of_the_published_rule(share, score):
    cases = {
        "both axes": (ENTROPIES, DIVERGENCES),
        "one entropy": ([0.7] * 5, [0.0, 1.0, 2.0, 3.0, 4.0]),
        "all alike": ([0.7] * 5, [0.2] * 5),
        "an infinite divergence": ([0.5, 0.1, 0.3], [0.1, math.inf, 0.2]),
        "one token": ([1.0], [2.0]),
    }
    for name, (entropies, divergences) in cases.items():
        found = importance_weights(tensor(*entropies), tensor(*divergences), share=share, score=score)
        assert found.tolist() == pytest.approx(importance_of(entropies, divergences, share, score), rel=1e-12), name
        assert found.mean() == pytest.approx(1, abs=1e-12), "the loss is the mean over the chosen tokens"
    assert importance_weights(tensor(), tensor(), share=share, score=score).tolist() == []


@pytest.mark.parametrize(("share", "expected"), [(0.5, [0.0] * 4), (0.7, [5 / 3, 0.0, 0.0, 0.0])])
def test_tokens_of_all_replicas_compete_and_those_without_a_hint_do_not(monkeypatch, share, expected):
    """This replica is the second of two; the first one has two tokens with the extremes of both axes."""
    other = torch.tensor([[4.0, 0.0], [0.0, 6.0]], dtype=torch.float64)
    monkeypatch.setattr(tip, "gather_objects", lambda own, group: [other, own])
    method = made(["recipe=tip", f"method.share={share}"], tiny.given())
    object.__setattr__(method.tools, "grid", SimpleNamespace(dp_group=None, dp_rank=1))
    measured = {"student_entropy": tensor(2.0, 0.0, 9.0, 1.0), "divergence": tensor(0.0, 1.2, 9.0, 0.0)}
    own = Signals(**{**vars(given([2, 1, 1], hinted=[True, False, True])), **measured})
    wanted = importance_of([4.0, 0.0, 2.0, 0.0, 1.0], [0.0, 6.0, 0.0, 1.2, 0.0], share, "soft_or")
    found = alone(method.terms(0, [], own), "divergence")
    assert found == pytest.approx([wanted[2], wanted[3], 0.0, wanted[4]])
    assert found == pytest.approx(expected)


# SCOPE: the numbers of the paper's figure 2, and who competes with whom.


def perplexities(*values: float) -> list[float]:
    return (-tensor(*values).log()).tolist()


def test_scope_weighs_wrong_responses_by_the_teacher_and_right_ones_by_the_student():
    terms = scope(signals([0, 0, 0], p=[0.0] * 3, q=perplexities(4.5, 2.9, 1.7)), weight=1.0, tau=1.0)
    assert alone(terms, "sampled_kl") == pytest.approx((0.192353, 0.298478, 0.509169), abs=1e-6)
    for tau, expected in ((1.0, (0.157895, 0.342105, 0.5)), (0.5, (0.063604, 0.298587, 0.637809))):
        terms = scope(signals([1, 1, 1], p=perplexities(1.2, 2.6, 3.8), q=[0.0] * 3), weight=1.0, tau=tau)
        assert alone(terms, "advantage") == pytest.approx(expected, abs=1e-6)


def test_scope_weighs_within_groups_and_kinds_and_skips_responses_without_a_hint():
    mixed = signals(
        [1, 0, 0, 1, 1, 0],
        groups=[0, 0, 0, 0, 1, 1],
        lengths=[2, 1, 1, 1, 1, 1],
        hinted=[True, True, False, True, True, False],
        p=[-1.0, -3.0, 0.0, 0.0, -1.0, -5.0, 0.0],
        q=[0.0, 0.0, -2.0, -1.0, 0.0, 0.0, 0.0],
    )
    terms = scope(mixed, weight=1.0, tau=1.0)
    first = torch.softmax(tensor(2.0, 1.0), 0).tolist()  # mean log-probs -2 and -1 of the two right ones
    expected = [first[0], first[0], 0.0, 0.0, first[1], 1.0, 0.0]
    assert terms.advantage.tolist() == pytest.approx(expected, abs=1e-12)
    assert terms.sampled_kl.tolist() == [0.0, 0.0, 1.0, 0.0, 0.0, 0.0, 0.0]


# Uni-OPD: a shift of every token, and groups with as many right as wrong responses.


@pytest.mark.parametrize(("gap", "half"), [("mean", 0.25), ("min_max", 0.325)])
def test_margin_shift_of_the_worked_example(gap, half):
    found = margin_shift(signals([1, 1, 0, 0]), tensor(-0.30, -0.10, -0.05, -0.15), 0.4, gap)
    assert found.tolist() == pytest.approx([half, half, -half, -half], abs=1e-12)


def test_uni_opd_shifts_every_token_masks_large_ratios_and_is_silent_without_a_hint():
    both = signals([1, 0], lengths=[2, 2], mu=[0.0, 0.0, 0.0, 0.0], q=[-0.2, -0.4, -12.0, 0.0])
    terms = uni_opd(both, weight=1.0, margin=8.0, gap="mean", max_log_ratio=10.0)
    shift = (8.0 - (-0.3 - -6.0)) / 2
    assert terms.advantage.tolist() == pytest.approx([-0.2 + shift, -0.4 + shift, 0.0, -shift], abs=1e-12)
    both = signals([1, 0], hinted=[False, True], mu=[0.0, 0.0], q=[-1.0, -1.0])
    assert uni_opd(both, weight=1.0, margin=0.4, gap="mean", max_log_ratio=10.0).advantage.tolist() == [0.0, -1.0]


def test_each_group_with_both_kinds_keeps_as_many_of_each():
    groups = [
        [tiny.rollout(f"{number}{i}$", reward, number) for i, reward in enumerate(rewards)]
        for number, rewards in enumerate(([1, 0, 0, 0, 0], [1, 1, 1], [0, 0], [1, 0, 1, 1, 0]))
    ]
    rollouts = [one for group in groups for one in group]
    kept = balanced(rollouts, 5, 3)
    rewards = [[one.reward for one in kept if one.group == number] for number in range(4)]
    assert [(sum(own), len(own)) for own in rewards] == [(1, 2), (3, 3), (0, 2), (2, 4)]
    assert kept == [one for one in rollouts if one in kept], "the order stays"
    assert balanced(rollouts, 5, 3) == kept, "the choice depends on seed, step and problem alone"
    assert balanced(groups[3], 5, 3) == [one for one in kept if one.group == 3]
    choices = {tuple(one.response.token_ids[1] for one in balanced(groups[0], 5, step)) for step in range(30)}
    assert len(choices) == 4, "every wrong response is dropped and kept at times"


# pi-Distill: the teacher by reward, and the student by imitation.


def test_pi_distill_trains_the_teacher_by_reward_and_the_student_by_imitation():
    """Two responses of the teacher, once after its own prompt and once after the plain one."""
    mu = [-0.2, -0.4, -0.1, -0.3, -0.2, -0.6]
    plain = [-0.9, -0.6, -0.3, -0.5, -0.2, -1.4]
    both = signals([1, 0, 1, 0], groups=[0, 0, 1, 1], lengths=[3] * 4, privileged=[True] * 2 + [False] * 2, mu=mu + mu)
    terms = pi_distill(both, group_advantages(both, "none"), beta=0.25, alpha=0.75)
    assert terms.divergence.tolist() == [2 * 0.75 * 0.25] * 6 + [0.0] * 6
    found = RatioTerms(terms, both.sampled_log_prob, None, Clip(ratio_cap=2.0))(tensor(*mu, *plain), torch.arange(12))
    share, ratios = 2 * 0.25, [0.496585, 0.818731, 0.818731, 0.818731, 1.0, 0.449329]
    advantages = [0.5] * 3 + [-0.5] * 3
    imitation = [share * (rho * advantage + 0.25) for rho, advantage in zip(ratios, advantages, strict=True)]
    assert found.policy.tolist() == pytest.approx([0.75] * 3 + [-0.75] * 3 + imitation, abs=1e-6)


# SOD: turns weigh by the distances of all earlier turns.

GAIN = 0.2


def turn_weights_of(distances: list[float]) -> list[float]:
    """Return the weights by the published formula: a product over the earlier turns, bounded once at its end."""
    found, product = [1.0], 1.0
    for earlier, later in pairwise(distances):
        product *= (earlier + 1e-6) / (later + 1e-6)
        found.append(min(product, 1 + GAIN))
    return found


def of_turns(episodes: list[int], turns: list[int], **more) -> Signals:
    return signals([0.0] * len(turns), episodes=episodes, turns=turns, **more)


@pytest.mark.parametrize(
    "distances", [[0.0, 0.0, 3.0], [0.0, 1e-7, 1e-6, 1e-5], [5.0, 1e-9, 5.0], [2.0], [1e-3, 1e3, 1e-3, 1.0]]
)
def test_weights_of_turns_are_the_product_of_the_ratios_of_all_earlier_turns(distances):
    found = turn_weights(of_turns([0] * len(distances), list(range(len(distances)))), tensor(*distances), GAIN)
    assert found.tolist() == pytest.approx(turn_weights_of(distances), rel=1e-12)


def test_weights_of_an_episode_depend_on_its_own_turns_alone_in_any_order():
    turns, distances = [2, 0, 0, 3, 1, 1], [0.05, 0.3, 0.10, 0.20, 0.40, 0.6]
    found = turn_weights(of_turns([1, 0, 1, 1, 1, 0], turns), tensor(*distances), GAIN)
    own, other = turn_weights_of([0.10, 0.40, 0.05, 0.20]), (0.3 + 1e-6) / (0.6 + 1e-6)
    assert found.tolist() == pytest.approx([own[2], 1.0, own[0], own[3], own[1], other], abs=1e-10)


def test_sod_has_the_weighted_log_ratio_of_the_teacher_and_0_without_a_hint_even_where_the_teacher_excludes_a_token():
    """Two turns of three and two tokens: their distances are .4 and .8, although their mean log-ratios are 0 and .2."""
    mu, q = [-1.0, -2.0, -0.5, -1.0, -3.0], [-1.6, -1.4, -0.5, -0.0, -3.6]
    found = sod(of_turns([0, 0], [0, 1], lengths=[3, 2], mu=mu, q=q), weight=0.5, gain=GAIN)
    second = 0.5 * (0.4 + 1e-6) / (0.8 + 1e-6)
    expected = [0.5 * -0.6, 0.5 * 0.6, 0.0, second * 1.0, second * -0.6]
    assert alone(found, "advantage") == pytest.approx(expected, abs=1e-12)
    excluded = of_turns([0, 0, 1], [0, 1, 0], hinted=[True, True, False], mu=[-1.0] * 3, q=[-2.0, -torch.inf, -4.0])
    assert sod(excluded, weight=1.0, gain=GAIN).advantage.tolist() == [-1.0, 0.0, 0.0]
