# Copyright (c) 2026 the megatron_selfdistill authors. Apache-2.0.
"""The coefficients that a step's loss gets from a method and from the loss's own settings, against numbers by hand."""

from __future__ import annotations

import math
from dataclasses import replace
from types import SimpleNamespace

import pytest
import term_arrays
import tiny
import torch
from characters import Characters
from made_methods import composed, given_with, made
from term_arrays import CLIP, DELTA, LOG_MU, LOG_Q, RHO, STUDENT, TOKEN, signals, tensor

from megatron_selfdistill.data.contexts import PromptPair
from megatron_selfdistill.loss.weighting import SequenceImportance, TokenOwners
from megatron_selfdistill.metrics.guards import trains_on_nothing
from megatron_selfdistill.rollout.base import Response
from megatron_selfdistill.sources.rollouts import Rollout
from megatron_selfdistill.sources.signals import MEASURED_SIGNALS, Clip, Terms, reach_of
from megatron_selfdistill.sources.step_terms import (
    RatioTerms,
    clipped_policy,
    position_below,
    token_factors,
)

pytestmark = pytest.mark.usefixtures("one_rank")
PROBLEM = tiny.problem("1+7", "given", "8")
SAMPLES = "rollout.num_samples=2"
MEASURED, TARGET = [-1.0, -2.0, -0.5, -1.5, -1.0], [-0.5, -3.0, -0.25, -0.5, -1.25]
MU = [-1.0, -2.0, -0.5, -1.5, -2.0]
SIGNALS = dict(
    zip(MEASURED_SIGNALS, (MEASURED, TARGET, [0.5, 1.0, 0.0, 2.0, 1.5], [0.25] * 5, [0.125] * 5), strict=True)
)


def rollout(group: int, sampled: list[float], correct: bool, hinted: bool = True) -> Rollout:
    response = Response([5] * len(sampled), [0.0] * len(sampled), sampled, "stop")
    return Rollout(PROBLEM, PromptPair("p", [1], [2]), response, group, float(correct), hinted)


def rollouts(last_is_hinted: bool = False) -> list[Rollout]:
    """Return two groups, whose numbers have a gap, as where another replica's groups lie between them."""
    return [rollout(3, MU[:2], True), rollout(3, MU[2:4], False), rollout(7, MU[4:], True, hinted=last_is_hinted)]


def coefficients(
    *overrides: str, measured: bool = True, last_is_hinted: bool = False, sampled: bool = True, given=None
):
    """Return the coefficients of `rollouts`; without ``sampled``, nobody knows the probability of their sampling."""
    given = given or rollouts(last_is_hinted)
    if not sampled:
        given = [
            replace(one, response=replace(one.response, sampled_log_probs=[math.nan] * n))
            for one, n in zip(given, (2, 2, 1), strict=True)
        ]

    def measure(contexts):
        assert measured, "nothing needs the log-probs of this step"
        return {name: torch.tensor(values, dtype=torch.float64) for name, values in SIGNALS.items()}

    models = SimpleNamespace(token_signals=measure)
    method = made([SAMPLES, *overrides], given_with(Characters()), readers=models, problems=[PROBLEM])
    return method.coefficients(0, given, [])(torch.tensor(MEASURED, dtype=torch.float64), torch.arange(5))


def test_rewards_alone_measure_nothing_and_have_no_divergence():
    found = coefficients("recipe=grpo", "method.advantage_std=none", "method.clip_high=2", measured=False)
    assert found.divergence.tolist() == [0.0] * 5
    assert found.policy.tolist() == pytest.approx([0.5, 0.5, -0.5, -0.5, 0.0])


@pytest.mark.parametrize("signal", ["sampled", "advantage"])
def test_signals_of_the_sampled_token_are_the_measured_log_ratios(signal):
    words = "name=opsd_rl weight=0 distill_weight=0.5 clip_low=null clip_high=null".split()
    found = coefficients(*(f"method.{word}" for word in words), f"method.signal={signal}")
    assert found.divergence.tolist() == [0.0] * 5
    assert found.policy.tolist() == pytest.approx([0.25, -0.5, 0.125, 0.5, 0.0])


def test_a_function_of_the_user_reads_entropies_and_divergence():
    found = coefficients("method.token_weights=hint_functions.doubts", "method.measured_signals=true")
    assert found.divergence.tolist() == [0.875, 1.375, 0.375, 2.375, 0.0], "a response without a hint has no teacher"


FIRST = [0.5 / 1.5, 0.25 / 1.25]
"""The shares of the discrepancies of both responses that their first tokens have."""


@pytest.mark.parametrize(
    ("name", "weights"),
    [
        ("reach", [1.0, 1.0, 1.0, math.exp(-0.5)]),
        ("reach method.reach_exponent=0.5", [1.0, 1.0, 1.0, math.exp(-0.25)]),
        ("reach rollout.temperature=0.7", [1.0, 1.0, 1.0, 1.0]),
        ("iw_opd", [1.5, 1.5 - FIRST[0] / 2, 1.5, 1.5 - FIRST[1] / 2]),
        ("iw_opd method.iw_gain=0", [1.0] * 4),
        ("evidence", [1.0, 0.0, 1.0, 1.0]),
        ("evidence method.evidence_margin=0.5", [1.0, 0.0, 0.0, 1.0]),
    ],
)
def test_the_loss_divides_by_the_sum_of_weights_with_a_name_over_all_replicas(monkeypatch, name, weights):
    """Another replica has 6 tokens whose weights and reach sum to 2.  The last token has no hint, and no part."""
    own = f"method.token_weights={name}".split()
    given = rollouts()
    given[1] = rollout(3, [TARGET[2] + 0.5, MU[3]], False)
    alone = coefficients(*own, given=given)
    mean = sum(weights) / 4
    assert alone.policy is None, "such weights are those of the divergence alone"
    assert alone.divergence.tolist() == pytest.approx([*(one / mean for one in weights), 0.0], rel=1e-12)
    assert mean != 1 or alone.divergence.tolist() == [1.0] * 4 + [0.0]
    monkeypatch.setattr(
        "megatron_selfdistill.sources.step_terms.gather_objects", lambda own, group: [own, (6.0, 2.0, 2.0)]
    )
    mean = (sum(weights) + 2) / 10
    together = coefficients(*own, given=given).divergence.tolist()
    assert together == pytest.approx([*(one / mean for one in weights), 0.0], rel=1e-12)


@pytest.mark.parametrize(
    ("rollout", "second"), [("", -0.5), ("rollout.top_k=2", -1.0), ("rollout.top_p=0.9", -1.0), ("recipe=opsd", -1.0)]
)
def test_the_reach_compares_with_the_sampler_at_temperature_1_and_else_with_the_student_turn_by_turn(rollout, second):
    given = signals([0] * 3, lengths=[2, 2, 1], mu=[-1.5, 0, math.nan, 0, 0], p=[-1.0] * 5, q=[-2.0, 0, -3, 0, 0])
    found = reach_of(given, composed(*rollout.split()).rollout)
    assert found.tolist() == pytest.approx([1.0, math.exp(second), 1.0, math.exp(-2), 1.0])


def test_tokens_that_the_loss_skips_have_no_part_in_the_sum_and_a_sum_below_one_token_trains_nothing():
    own = ["method.token_weights=evidence", "loss.skip_first_tokens=1"]
    assert coefficients(*own).divergence.tolist() == [0.0, 0.0, 0.0, 2.0, 0.0]
    assert not coefficients(*own, "method.evidence_margin=2").divergence.any()
    assert trains_on_nothing({"weights/sum": 0.99}) and not trains_on_nothing({"weights/sum": 1.0})


def test_sod_weighs_the_turns_of_an_episode_beside_the_returns_of_the_episodes():
    first, second, other = (rollout(0, mu, right) for mu, right in ((MU[:2], False), (MU[2:4], True), (MU[4:], False)))
    turns = [replace(first, episode=4), replace(second, episode=4, turn=1), replace(other, episode=5)]
    found = coefficients("recipe=sod", "method.clip_low=null", "method.clip_high=null", given=turns)
    later, by_return = 0.75 / 0.625, 0.5**0.5
    expected = [by_return + delta for delta in (0.5, -1.0, 0.25 * later, 1.0 * later)]
    ratio = torch.tensor(1.0).double().exp().item()
    assert found.policy.tolist() == pytest.approx([*expected, ratio * (0.75 - by_return)], abs=1e-5)
    assert not found.divergence.any()


def test_sequences_count_alike_and_first_tokens_are_skipped():
    found = coefficients("loss.normalize=sequences", "loss.skip_first_tokens=1", measured=False)
    assert found.divergence.tolist() == pytest.approx([0.0, 5 / 3 / 2, 0.0, 5 / 3 / 2, 0.0])
    assert found.policy is None


@pytest.mark.parametrize("kind", ["truncated", "truncated_sequence"])
def test_a_correction_multiplies_the_divergence_alone(kind, monkeypatch):
    monkeypatch.setattr("megatron_selfdistill.sources.step_terms.over_last_stage", lambda values, grid: values)
    options = [f"loss.rollout_correction={kind}", "loss.rollout_correction_cap=1.5", "method.name=opsd_rl"]
    options += ["method.advantage_std=none", "method.clip_high=null"]
    found = coefficients(*options, measured=False, last_is_hinted=True)
    assert found.divergence.tolist() == pytest.approx([1.0] * 4 + [1.5])
    assert found.policy.tolist() == pytest.approx([0.5, 0.5, -0.5, -0.5, 0.0])


@pytest.mark.parametrize("advantage", [0.7, -0.7])
@pytest.mark.parametrize("log_ratio", [-0.6, -0.2, 0.0, 0.2, 0.6])
def test_clipped_coefficient_has_the_gradient_of_the_clipped_objective(advantage, log_ratio):
    s = torch.tensor(STUDENT, dtype=torch.float64, requires_grad=True)
    log_p = s.log_softmax(0)[TOKEN]
    ratio = (log_p - (log_p.detach() - log_ratio)).exp()
    objective = -torch.minimum(ratio * advantage, ratio.clamp(0.8, 1.28) * advantage)
    (expected,) = torch.autograd.grad(objective, s, retain_graph=True)
    a, _ = clipped_policy(tensor(advantage), tensor(log_ratio), Clip(0.2, 0.28))
    (found,) = torch.autograd.grad(-a.squeeze() * log_p, s)
    torch.testing.assert_close(found, expected, atol=1e-14, rtol=0)


def test_sampled_kl_has_the_gradient_of_k3_with_the_ratio():
    """The loss is rho (e^-l - 1 + l) with l = log p - log q, where the gradient flows through rho and l."""
    s = torch.tensor(STUDENT, dtype=torch.float64, requires_grad=True)
    log_p = s.log_softmax(0)[TOKEN]
    l = log_p - LOG_Q  # noqa: E741
    (expected,) = torch.autograd.grad((log_p - LOG_MU).exp() * ((-l).exp() - 1 + l), s, retain_graph=True)
    a = term_arrays.coefficients(Terms.of(tensor(0.0), sampled_kl=tensor(1.0))).policy
    (found,) = torch.autograd.grad(-a.squeeze() * log_p, s)
    torch.testing.assert_close(found, expected, atol=1e-11, rtol=0)
    assert a.item() == pytest.approx(RHO * DELTA, abs=1e-11)


def test_clip_holds_the_advantage_and_neither_the_divergence_nor_the_likelihood():
    everything = Terms.of(
        tensor(0.0), divergence=tensor(0.4), advantage=tensor(0.7), sampled_kl=tensor(0.1), likelihood=tensor(0.25)
    )
    free = term_arrays.coefficients(everything, cap=2.0)
    assert free.policy.item() == pytest.approx(0.560874781986 + 0.1 * RHO * DELTA + 0.25, abs=1e-11)
    assert free.divergence.item() == pytest.approx(0.4 * RHO, abs=1e-11) and not free.clipped.item()
    held = term_arrays.coefficients(everything, mu=LOG_MU - 0.5, cap=1.1)
    ratio = 1.321037
    assert held.policy.item() == pytest.approx(0.1 * ratio * DELTA + 0.25, abs=1e-6) and held.clipped.item()
    assert held.divergence.item() == pytest.approx(0.4 * 1.1, abs=1e-12)


def test_token_without_weight_ignores_a_target_that_excludes_it():
    found = term_arrays.coefficients(Terms.of(tensor(0.0), advantage=tensor(1.0)), q=-torch.inf)
    assert found.policy.item() == pytest.approx(RHO, abs=1e-11)


@pytest.mark.parametrize(
    ("normalize", "expected"),
    [("tokens", [1.0] * 4), ("sequences", [12 / 3 / 3] * 3 + [12 / 3]), ("prompts", [6.0] * 4)],
)
def test_factors_turn_a_sum_over_tokens_into_other_means(normalize, expected):
    """The global batch has 12 tokens in 3 responses to 2 problems; this replica has 4 of the tokens."""
    found = token_factors(signals([0, 0], lengths=[3, 1]), normalize, (12, 3, 2))
    assert found.tolist() == pytest.approx(expected, abs=1e-15)


def test_weight_of_a_sequence_is_the_mean_ratio_up_to_the_cap():
    """The tokens arrive in any order; another rank holds a third token of the first response, above the cap alone."""

    def over_ranks(sums: torch.Tensor) -> torch.Tensor:
        return sums + tensor(4.0, 0.0, 1.0, 0.0).view(2, 2)

    mu = tensor(-1.0, -2.0, -3.0, -1.0)
    weights = SequenceImportance(mu, TokenOwners.of([3, 1], over_ranks), cap=2.0)
    found = weights(tensor(-0.5, -1.0, -1.5), torch.tensor([3, 0, 1]))
    mean = (1.0 + math.exp(0.5) + 4.0) / 3
    assert found.divergence.tolist() == pytest.approx([math.exp(0.5), min(mean, 2.0), min(mean, 2.0)])
    assert found.policy is None


def test_expectation_of_the_sampled_signal_is_the_gradient_of_the_full_divergence():
    s = torch.tensor(STUDENT, dtype=torch.float64, requires_grad=True)
    log_p, log_q = s.log_softmax(0), tensor(0.2, 1.5, -1.0, 0.4).log_softmax(0)
    (full,) = torch.autograd.grad((log_p.exp() * (log_p - log_q)).sum(), s, retain_graph=True)
    total = torch.zeros(4, dtype=torch.float64)
    for token in range(4):
        own = log_p[token, None].detach()
        terms = RatioTerms(Terms.of(tensor(0.0), sampled_kl=tensor(1.0)), own, log_q[token, None], CLIP)
        a = terms(own, torch.tensor([0])).policy
        (gradient,) = torch.autograd.grad(-a.squeeze() * log_p[token], s, retain_graph=True)
        total += log_p[token].exp().detach() * gradient
    torch.testing.assert_close(total, full, atol=1e-15, rtol=0)


def test_first_tokens_of_each_response_can_be_skipped():
    found = token_factors(signals([0, 0, 0], lengths=[4, 2, 1]), "tokens", (7, 3, 1), skip_first_tokens=2)
    assert found.tolist() == [0, 0, 1, 1, 0, 0, 0]


@pytest.mark.parametrize("weights", [[4.0, 1.0, 0.0], [0.0, 0.0, 3.0], [1.0] * 40, [0.0, 0.0], []])
def test_the_position_below_which_the_weights_lie_is_the_first_with_their_share(weights):
    other = [0.5] * (len(weights) // 2)
    both = torch.tensor([*weights, *other], dtype=torch.float64)
    found = position_below(both, [len(weights), len(other)], SimpleNamespace(dp_group=None))
    total = sum(weights) + sum(other)
    enough = [n for n in range(len(weights) + 1) if total and sum(weights[:n]) + sum(other[:n]) >= 0.95 * total]
    assert found == (enough[0] if enough else 0)
