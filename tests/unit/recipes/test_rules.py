# Copyright (c) 2026 the megatron_selfdistill authors. Apache-2.0.
"""The rules of the literature as pure functions of arrays, against numbers of the papers and gradients of autograd."""

from __future__ import annotations

import math
from dataclasses import replace

import pytest
import torch

from megatron_selfdistill.loss.weighting import SequenceImportance, TokenOwners, TruncatedImportance
from megatron_selfdistill.recipes.advantages import clipped_policy, group_advantage, group_advantages, reward_advantage
from megatron_selfdistill.recipes.normalization import token_factors
from megatron_selfdistill.recipes.pi_distill import pi_distill
from megatron_selfdistill.recipes.ratio_terms import RatioTerms
from megatron_selfdistill.recipes.scope import group_shares, scope
from megatron_selfdistill.recipes.signals import Signals, Terms
from megatron_selfdistill.recipes.teacher_terms import uniform
from megatron_selfdistill.recipes.uni_opd import margin_shift, uni_opd

# One row of logits over four tokens: student, teacher, and the student that sampled token 1.
STUDENT, TEACHER, SAMPLER, TOKEN = (1.2, 0.3, -0.5, 0.0), (0.2, 1.5, -1.0, 0.4), (1.0, 0.5, -0.4, 0.1), 1
LOG_P, LOG_Q, LOG_MU = -1.536813518363, -0.523240958765, -1.315230858912
DELTA, RHO = 1.013572559598, 0.801249688551


def tensor(*values: float) -> torch.Tensor:
    return torch.tensor(values, dtype=torch.float64)


def signals(rewards, groups=None, lengths=None, hinted=None, privileged=None, mu=None, p=None, q=None) -> Signals:
    """Return signals in which, unless given, all responses lie in one group, have a hint, and one token."""
    lengths = torch.tensor(lengths or [1] * len(rewards))
    num_tokens = int(lengths.sum())
    return Signals(
        lengths=lengths,
        groups=torch.tensor(groups or [0] * len(rewards)),
        rewards=tensor(*rewards),
        hinted=torch.tensor(hinted or [True] * len(rewards)),
        privileged=torch.tensor(privileged or [False] * len(rewards)),
        sampled_log_prob=torch.zeros(num_tokens, dtype=torch.float64) if mu is None else tensor(*mu),
        student_log_prob=None if p is None else tensor(*p),
        target_log_prob=None if q is None else tensor(*q),
    )


def log_probs(logits) -> torch.Tensor:
    return torch.tensor(logits, dtype=torch.float64).log_softmax(0)


def test_row_has_the_log_probs_of_the_worked_example():
    assert log_probs(STUDENT)[TOKEN].item() == pytest.approx(LOG_P, abs=1e-11)
    assert log_probs(TEACHER)[TOKEN].item() == pytest.approx(LOG_Q, abs=1e-11)
    assert log_probs(SAMPLER)[TOKEN].item() == pytest.approx(LOG_MU, abs=1e-11)


@pytest.mark.parametrize(
    ("std", "right", "wrong"),
    [("population", 1.732047, -0.577349), ("sample", 1.620182, -0.540061), ("none", 0.75, -0.25)],
)
def test_group_advantages_of_two_right_among_eight(std, right, wrong):
    rewards = (1, 0, 0, 1, 0, 0, 0, 0)
    expected = [right if reward else wrong for reward in rewards]
    assert group_advantages(signals(rewards), std).tolist() == pytest.approx(expected, abs=1e-6)


@pytest.mark.parametrize("std", ["population", "sample", "none"])
def test_equal_rewards_and_single_responses_have_no_advantage(std):
    found = group_advantages(signals([1, 1, 0, 0, 0, 1], groups=[0, 0, 1, 1, 1, 2]), std)
    assert found.tolist() == [0.0] * 6


def test_groups_do_not_touch_each_other():
    one, other = [1, 0, 0], [0, 0.5, 1, 1]
    together = group_advantages(signals(one + other, groups=[0] * 3 + [1] * 4), "sample")
    apart = torch.cat([group_advantages(signals(rewards), "sample") for rewards in (one, other)])
    assert torch.equal(together, apart)


def episodes_of(rewards, episodes, turns, groups) -> Signals:
    numbers = {"episodes": torch.tensor(episodes), "turns": torch.tensor(turns)}
    return replace(signals(rewards, groups=groups), **numbers)


def test_every_turn_of_an_episode_has_the_advantage_of_its_sum_of_rewards():
    # Three episodes of a group, of two, one and three turns, and one episode of another group.
    found = group_advantages(
        episodes_of([0, 1, 1, 0, 0, 0, 5], [0, 0, 1, 2, 2, 2, 3], [0, 1, 0, 0, 1, 2, 0], [0] * 6 + [1]), "none"
    )
    assert found.tolist() == pytest.approx([1 / 3] * 3 + [-2 / 3] * 3 + [0.0])


@pytest.mark.parametrize("std", ["population", "sample", "none"])
@pytest.mark.parametrize("credit", ["episode", "turn"])
def test_an_episode_of_one_turn_is_a_response(std, credit):
    rewards, groups = [1, 0, 0, 0.5, 1, 0], [0, 0, 0, 1, 1, 1]
    single = episodes_of(rewards, [3, 1, 0, 2, 5, 4], [0] * 6, groups)
    assert torch.equal(group_advantages(single, std, credit), group_advantages(signals(rewards, groups), std))


def test_returns_of_turns_are_discounted_and_compared_with_the_same_turn():
    # RLTF, four episodes of two turns: R(y0) = (0, 0, 1, 0), R(y1) = (1, 0, 1, 1), gamma = .1.
    rewards = [reward for pair in zip((0, 0, 1, 0), (1, 0, 1, 1), strict=True) for reward in pair]
    both = episodes_of(rewards, [0, 0, 1, 1, 2, 2, 3, 3], [0, 1] * 4, [0] * 8)
    found = group_advantages(both, "none", "turn", 0.1)
    assert found[::2].tolist() == pytest.approx([-0.225, -0.325, 0.775, -0.225], abs=1e-15)
    assert found[1::2].tolist() == pytest.approx([0.25, -0.75, 0.25, 0.25], abs=1e-15)


def test_a_turn_that_an_episode_does_not_reach_counts_in_no_mean():
    found = group_advantages(
        episodes_of([1, 0, 1, 0, 0], [0, 1, 1, 2, 2], [0, 0, 1, 0, 1], [0] * 5), "none", "turn", 0.5
    )
    assert found.tolist() == pytest.approx([1 - 0.5, 0.5 - 0.5, 0.5, 0 - 0.5, -0.5])


def test_advantage_of_a_response_is_that_of_each_of_its_tokens():
    terms = group_advantage(signals([1, 0], lengths=[3, 2]), weight=2.0, std="none")
    assert terms.advantage.tolist() == [1.0, 1.0, 1.0, -1.0, -1.0]
    assert not terms.divergence.any() and not terms.sampled_kl.any() and not terms.likelihood.any()


@pytest.mark.parametrize(
    ("advantage", "shift", "coefficient"),
    [(0.7, 0.0, 0.560874781986), (0.7, -0.5, 0.0), (-0.7, 0.5, 0.0), (0.7, 0.5, 0.340187751534)],
)
def test_clip_of_the_worked_example(advantage, shift, coefficient):
    a, clipped = clipped_policy(tensor(advantage), tensor(LOG_P - LOG_MU - shift), 0.2, 0.28)
    assert a.item() == pytest.approx(coefficient, abs=1e-11)
    assert clipped.item() == (coefficient == 0)


@pytest.mark.parametrize("advantage", [0.7, -0.7])
@pytest.mark.parametrize("log_ratio", [-0.6, -0.2, 0.0, 0.2, 0.6])
def test_clipped_coefficient_has_the_gradient_of_the_clipped_objective(advantage, log_ratio):
    s = torch.tensor(STUDENT, dtype=torch.float64, requires_grad=True)
    log_p = s.log_softmax(0)[TOKEN]
    ratio = (log_p - (log_p.detach() - log_ratio)).exp()
    objective = -torch.minimum(ratio * advantage, ratio.clamp(0.8, 1.28) * advantage)
    (expected,) = torch.autograd.grad(objective, s, retain_graph=True)
    a, _ = clipped_policy(tensor(advantage), tensor(log_ratio), 0.2, 0.28)
    (found,) = torch.autograd.grad(-a.squeeze() * log_p, s)
    torch.testing.assert_close(found, expected, atol=1e-14, rtol=0)


def coefficients(terms: Terms, mu=LOG_MU, q: float | None = LOG_Q, low=0.2, high=0.28, cap=None, p=LOG_P):
    target = None if q is None else tensor(q)
    correction = None if cap is None else TruncatedImportance(tensor(mu), cap)
    return RatioTerms(terms, tensor(mu), target, low, high, correction=correction)(tensor(p), torch.tensor([0]))


def test_sampled_kl_has_the_gradient_of_k3_with_the_ratio():
    """The loss is rho (e^-l - 1 + l) with l = log p - log q, where the gradient flows through rho and l."""
    s = torch.tensor(STUDENT, dtype=torch.float64, requires_grad=True)
    log_p = s.log_softmax(0)[TOKEN]
    l = log_p - LOG_Q  # noqa: E741
    (expected,) = torch.autograd.grad((log_p - LOG_MU).exp() * ((-l).exp() - 1 + l), s, retain_graph=True)
    a = coefficients(Terms.of(tensor(0.0), sampled_kl=tensor(1.0))).policy
    (found,) = torch.autograd.grad(-a.squeeze() * log_p, s)
    torch.testing.assert_close(found, expected, atol=1e-11, rtol=0)
    assert a.item() == pytest.approx(RHO * DELTA, abs=1e-11)


def test_skill_sd_adds_the_pull_of_the_skill_to_the_advantage():
    """The worked example of Skill-SD: the loss of the pull alone, its coefficient and gradient, and both parts."""
    one = signals([0.0], mu=[LOG_MU], q=[LOG_Q])
    pull = uniform(one, weight=1.0, signal="sampled")
    assert RHO * (math.exp(DELTA) - 1 - DELTA) == pytest.approx(0.594410944168, abs=1e-11)
    a = coefficients(pull).policy
    assert a.item() == pytest.approx(0.812124697702, abs=1e-11)
    s = torch.tensor(STUDENT, dtype=torch.float64, requires_grad=True)
    (gradient,) = torch.autograd.grad(-a.squeeze() * s.log_softmax(0)[TOKEN], s)
    expected = tensor(0.429593914900, -0.637464845900, 0.078479730300, 0.129391200700)
    torch.testing.assert_close(gradient, expected, atol=1e-10, rtol=0)
    both = uniform(one, weight=0.001, signal="sampled") + Terms.of(one.sampled_log_prob, advantage=tensor(0.7))
    assert coefficients(both).policy.item() == pytest.approx(0.560874781986 + 0.001 * 0.812124697702, abs=1e-11)


def test_reward_advantage_is_the_reward_itself():
    found = reward_advantage(signals([1.0, -1.0, 0.0], groups=[0, 0, 1], lengths=[2, 1, 1]), weight=0.5)
    assert found.advantage.tolist() == [0.5, 0.5, -0.5, 0.0]
    assert not found.divergence.any() and not found.sampled_kl.any() and not found.likelihood.any()


def test_expectation_of_the_sampled_signal_is_the_gradient_of_the_full_divergence():
    s = torch.tensor(STUDENT, dtype=torch.float64, requires_grad=True)
    log_p, log_q = s.log_softmax(0), log_probs(TEACHER)
    (full,) = torch.autograd.grad((log_p.exp() * (log_p - log_q)).sum(), s, retain_graph=True)
    total = torch.zeros(4, dtype=torch.float64)
    for token in range(4):
        terms = Terms.of(tensor(0.0), sampled_kl=tensor(1.0))
        own = log_p[token].item()
        a = coefficients(terms, mu=own, q=float(log_q[token]), p=own).policy
        (gradient,) = torch.autograd.grad(-a.squeeze() * log_p[token], s, retain_graph=True)
        total += log_p[token].exp().detach() * gradient
    torch.testing.assert_close(total, full, atol=1e-15, rtol=0)


def test_clip_holds_the_advantage_and_neither_the_divergence_nor_the_likelihood():
    everything = Terms.of(
        tensor(0.0), divergence=tensor(0.4), advantage=tensor(0.7), sampled_kl=tensor(0.1), likelihood=tensor(0.25)
    )
    free = coefficients(everything, cap=2.0)
    assert free.policy.item() == pytest.approx(0.560874781986 + 0.1 * RHO * DELTA + 0.25, abs=1e-11)
    assert free.divergence.item() == pytest.approx(0.4 * RHO, abs=1e-11) and not free.clipped.item()
    held = coefficients(everything, mu=LOG_MU - 0.5, cap=1.1)
    ratio = 1.321037
    assert held.policy.item() == pytest.approx(0.1 * ratio * DELTA + 0.25, abs=1e-6) and held.clipped.item()
    assert held.divergence.item() == pytest.approx(0.4 * 1.1, abs=1e-12)


def test_token_without_weight_ignores_a_target_that_excludes_it():
    terms = Terms.of(tensor(0.0), advantage=tensor(1.0))
    found = coefficients(terms, q=-torch.inf)
    assert found.policy.item() == pytest.approx(RHO, abs=1e-11)


def test_without_a_policy_term_the_coefficients_have_none():
    found = RatioTerms(
        Terms.of(tensor(0.0), divergence=tensor(1.0)), tensor(LOG_MU), None, None, None, has_policy_term=False
    )(tensor(LOG_P), torch.tensor([0]))
    assert found.policy is None and found.divergence.tolist() == [1.0]


@pytest.mark.parametrize(
    ("signal", "field", "value"),
    [("full", "divergence", 0.3), ("sampled", "sampled_kl", 0.3), ("advantage", "advantage", 0.3 * (LOG_Q - LOG_MU))],
)
def test_uniform_signal_is_silent_without_a_hint(signal, field, value):
    both = signals([0, 1], hinted=[True, False], mu=[LOG_MU, LOG_MU], q=[LOG_Q, LOG_Q])
    terms = uniform(both, weight=0.3, signal=signal)
    for name in ("divergence", "advantage", "sampled_kl", "likelihood"):
        expected = [value, 0.0] if name == field else [0.0, 0.0]
        assert getattr(terms, name).tolist() == pytest.approx(expected, abs=1e-11)


def test_advantage_of_reward_and_teacher_is_their_sum():
    """The published number of OpenClaw-RL's combination: a reward of .5 and the teacher's log-ratio to mu."""
    one = signals([0.5], mu=[LOG_MU], q=[LOG_Q])
    both = uniform(one, weight=1.0, signal="advantage") + reward_advantage(one, weight=1.0)
    assert both.advantage.item() == pytest.approx(1.291989900148, abs=1e-11)


def perplexities(*values: float) -> list[float]:
    return (-tensor(*values).log()).tolist()


def test_scope_weighs_wrong_responses_by_the_teacher():
    """The numbers of the paper's figure 2."""
    wrong = signals([0, 0, 0], p=[0.0] * 3, q=perplexities(4.5, 2.9, 1.7))
    terms = scope(wrong, weight=1.0, tau=1.0)
    assert terms.sampled_kl.tolist() == pytest.approx((0.192353, 0.298478, 0.509169), abs=1e-6)
    assert not terms.advantage.any()


@pytest.mark.parametrize(("tau", "expected"), [(1.0, (0.157895, 0.342105, 0.5)), (0.5, (0.063604, 0.298587, 0.637809))])
def test_scope_weighs_right_responses_by_the_student(tau, expected):
    """The numbers of the paper's figure 2."""
    right = signals([1, 1, 1], p=perplexities(1.2, 2.6, 3.8), q=[0.0] * 3)
    terms = scope(right, weight=1.0, tau=tau)
    assert terms.advantage.tolist() == pytest.approx(expected, abs=1e-6)
    assert not terms.sampled_kl.any()


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


def test_shares_of_very_unlikely_responses_stay_finite():
    shares = group_shares(signals([1, 1]), tensor(-4000.0, -4001.0), torch.tensor([True, True]))
    assert shares.tolist() == pytest.approx(torch.softmax(tensor(1.0, 0.0), 0).tolist(), abs=1e-12)


@pytest.mark.parametrize(("gap", "half"), [("mean", 0.25), ("min_max", 0.325)])
def test_margin_shift_of_the_worked_example(gap, half):
    found = margin_shift(signals([1, 1, 0, 0]), tensor(-0.30, -0.10, -0.05, -0.15), 0.4, gap)
    assert found.tolist() == pytest.approx([half, half, -half, -half], abs=1e-12)


@pytest.mark.parametrize("gap", ["mean", "min_max"])
def test_margin_shift_needs_both_kinds_and_a_gap_below_the_margin(gap):
    two = signals([1, 0, 1, 1, 0, 0], groups=[0, 0, 1, 1, 2, 2])
    assert margin_shift(two, tensor(1.0, 0.0, -3.0, 0.0, 5.0, 6.0), 0.4, gap).tolist() == [0.0] * 6


def test_uni_opd_shifts_every_token_and_masks_large_ratios():
    both = signals(
        [1, 0],
        lengths=[2, 2],
        mu=[0.0, 0.0, 0.0, 0.0],
        q=[-0.2, -0.4, -12.0, 0.0],
    )
    terms = uni_opd(both, weight=1.0, margin=8.0, gap="mean", max_log_ratio=10.0)
    shift = (8.0 - (-0.3 - -6.0)) / 2
    assert terms.advantage.tolist() == pytest.approx([-0.2 + shift, -0.4 + shift, 0.0, -shift], abs=1e-12)


def test_uni_opd_is_silent_without_a_hint():
    both = signals([1, 0], hinted=[False, True], mu=[0.0, 0.0], q=[-1.0, -1.0])
    assert uni_opd(both, weight=1.0, margin=0.4, gap="mean", max_log_ratio=10.0).advantage.tolist() == [0.0, -1.0]


def test_pi_distill_trains_the_teacher_by_reward_and_the_student_by_imitation():
    """Two responses of the teacher, once after its own prompt and once after the plain one."""
    mu = [-0.2, -0.4, -0.1, -0.3, -0.2, -0.6]
    plain = [-0.9, -0.6, -0.3, -0.5, -0.2, -1.4]
    both = signals(
        [1, 0, 1, 0], groups=[0, 0, 1, 1], lengths=[3] * 4, privileged=[True, True, False, False], mu=mu + mu
    )
    terms = pi_distill(both, group_advantages(both, "none"), beta=0.25, alpha=0.75)
    assert terms.divergence.tolist() == [2 * 0.75 * 0.25] * 6 + [0.0] * 6
    found = RatioTerms(terms, both.sampled_log_prob, None, None, None, ratio_cap=2.0)(
        tensor(*mu, *plain), torch.arange(12)
    )
    share, ratios = 2 * 0.25, [0.496585, 0.818731, 0.818731, 0.818731, 1.0, 0.449329]
    advantages = [0.5] * 3 + [-0.5] * 3
    imitation = [share * (rho * advantage + 0.25) for rho, advantage in zip(ratios, advantages, strict=True)]
    assert found.policy.tolist() == pytest.approx([0.75] * 3 + [-0.75] * 3 + imitation, abs=1e-6)


def test_ratio_of_an_advantage_is_bounded():
    a, clipped = clipped_policy(tensor(0.5, -0.5, 0.5), tensor(1.0, 1.0, 0.1), None, None, 2.0)
    assert a.tolist() == pytest.approx([1.0, -1.0, 0.5 * 1.1051709]) and not clipped.any()


@pytest.mark.parametrize(
    ("normalize", "expected"),
    [("tokens", [1.0] * 4), ("sequences", [12 / 3 / 3] * 3 + [12 / 3]), ("prompts", [6.0] * 4)],
)
def test_factors_turn_a_sum_over_tokens_into_other_means(normalize, expected):
    """The global batch has 12 tokens in 3 responses to 2 problems; this replica has 4 of the tokens."""
    found = token_factors(signals([0, 0], lengths=[3, 1]), normalize, (12, 3, 2))
    assert found.tolist() == pytest.approx(expected, abs=1e-15)


def test_first_tokens_of_each_response_can_be_skipped():
    found = token_factors(signals([0, 0, 0], lengths=[4, 2, 1]), "tokens", (7, 3, 1), skip_first_tokens=2)
    assert found.tolist() == [0, 0, 1, 1, 0, 0, 0]


def test_weight_of_a_sequence_is_the_mean_ratio_up_to_the_cap():
    """The tokens of the two responses arrive in any order; another rank holds a third token of the first response."""

    def over_ranks(sums: torch.Tensor) -> torch.Tensor:
        return sums + tensor(4.0, 0.0, 1.0, 0.0).view(2, 2)

    mu = tensor(-1.0, -2.0, -3.0, -1.0)
    weights = SequenceImportance(mu, TokenOwners.of([3, 1], over_ranks), cap=2.0)
    found = weights(tensor(-0.5, -1.0, -1.5), torch.tensor([3, 0, 1]))
    mean = (1.0 + torch.tensor(0.5).double().exp().item() + 4.0) / 3
    assert found.divergence.tolist() == pytest.approx(
        [torch.tensor(0.5).double().exp().item(), min(mean, 2.0), min(mean, 2.0)]
    )
    assert found.policy is None
