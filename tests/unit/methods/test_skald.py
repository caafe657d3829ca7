# Copyright (c) 2026 the megatron_selfdistill authors. Apache-2.0.
"""SKALD: the tilted loss and its gradient, whose gate is open, and what a closed gate trains on."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import pytest
import torch
from characters import Characters
from made_methods import TextSampler, composed, given_with, made, response_of
from term_arrays import signals, tensor

from megatron_selfdistill.data.problems import Problem
from megatron_selfdistill.loss import Divergence, Target, VocabShard, distillation_loss
from megatron_selfdistill.methods.skald import mean_gain, states_answer
from megatron_selfdistill.rollout.sampling import SampleKey
from megatron_selfdistill.sources.rollouts import Rollout
from megatron_selfdistill.sources.signals import signals_of

pytestmark = pytest.mark.usefixtures("one_rank")
STEP = 6
GIVEN = given_with(Characters(), max_length=60)


def problem(name: str, card: str = "carry", answer: str | None = "8") -> Problem:
    return Problem(name, ({"role": "user", "content": "1+7"},), card, answer, "file.jsonl:1")


def group(number: int, asked: Problem, rewards: Sequence[float]) -> list[Rollout]:
    """Return the plain responses to a problem, with their rewards."""
    pair = GIVEN.pair(asked)
    return [
        Rollout(asked, pair, response_of("8$"), number, reward, key=SampleKey(STEP, asked.id, i))
        for i, reward in enumerate(rewards)
    ]


def method(sampler: Any = None, *overrides: str) -> Any:
    return made(["recipe=skald", "method.num_hinted=2", "seed=5", *overrides], GIVEN, sampler=sampler)


@pytest.mark.parametrize("tau", [0.05, 0.4, 0.8, 1.0])
def test_the_gradient_is_that_of_the_teachers_cross_entropy_under_a_tilt(tau):
    """The loss is another number, but its gradient is that of -1 / tau log(sum of softmax(t) p^tau)."""
    w = 1 / tau
    config = composed("recipe=skald", f"target.teacher_weight={w}", f"target.k={w}")
    generator = torch.Generator().manual_seed(3)
    s, t = (3 * torch.randn(6, 9, generator=generator, dtype=torch.float64) for _ in "st")
    student, leaf = s.clone().requires_grad_(), s.clone().requires_grad_()
    tilted = -(t.log_softmax(-1) + tau * student.log_softmax(-1)).logsumexp(-1) / tau
    (wanted,) = torch.autograd.grad(tilted.sum(), student)
    found = distillation_loss(
        leaf,
        t,
        torch.zeros(len(s), dtype=torch.int64),
        target=Target.configured(config.target),
        divergence=Divergence.configured(config.loss, config.method),
        vocab=VocabShard(0, s.shape[1], s.shape[1]),
    )
    q, log_p = (t + tau * s).softmax(-1), s.log_softmax(-1)
    torch.testing.assert_close(found.loss.detach(), (q * (q.log() - log_p)).sum(-1), rtol=1e-11, atol=1e-12)
    found.loss.sum().backward()
    torch.testing.assert_close(leaf.grad, wanted, rtol=1e-11, atol=1e-12)


def test_the_limit_without_a_tilt_is_the_teachers_cross_entropy():
    t, s = tensor(1.0, -2.0, 0.5), tensor(0.3, 0.1, -1.0).requires_grad_()
    tau = 1e-6
    tilted = -(t.log_softmax(0) + tau * s.log_softmax(0)).logsumexp(0) / tau
    cross_entropy = -(t.softmax(0) * s.log_softmax(0)).sum()
    gradients = [torch.autograd.grad(value, s)[0] for value in (tilted, cross_entropy)]
    torch.testing.assert_close(*gradients, rtol=0, atol=1e-5)


def test_the_gate_of_a_problem_opens_where_the_hinted_responses_are_better():
    """The card helps with the first problem, does nothing for the second, and harms with the third."""
    plain = [*group(0, problem("a"), [0, 1]), *group(1, problem("b"), [1, 0]), *group(2, problem("c"), [1, 1])]
    sampler = TextSampler(STEP, "8$", "8$", "8$", "7$", "7$", "8$")
    chosen, metrics = method(sampler).select(STEP, plain)
    assert [one.hinted for one in chosen] == [True] * 2 + [False] * 4
    assert [one.response for one in chosen] == [one.response for one in plain], "the hinted responses train nothing"
    assert all(one.prompts.teacher_prompt == one.prompts.student_prompt for one in chosen[2:])
    assert metrics == {"hints/share": pytest.approx(2 / 6), "skills/advantage": pytest.approx((0.5 + 0 - 0.5) / 3)}
    assert {"".join(map(chr, one.prompt)) for one in sampler.requests} == {"1+7|carry:"}
    assert len({one.seed for one in sampler.requests}) == 6


def test_a_card_that_states_the_answer_is_not_shown():
    plain = [*group(0, problem("a", "it is 8"), [0, 0]), *group(1, problem("b"), [0, 0])]
    chosen, metrics = method(TextSampler(STEP, "8$", "8$")).select(STEP, plain)
    assert [one.hinted for one in chosen] == [False, False, True, True] and metrics["skills/advantage"] == 1
    shown, _ = method(TextSampler(STEP, *["8$"] * 4), "method.filters_answers=false").select(STEP, plain)
    assert all(one.hinted for one in shown)


def test_a_truncated_hinted_response_is_wrong_and_a_replica_without_problems_takes_part():
    chosen, _ = method(TextSampler(STEP, "8", "8")).select(STEP, group(0, problem("a"), [0, 0]))
    assert not any(one.hinted for one in chosen)
    assert method(TextSampler(STEP)).select(STEP, []) == ([], {"hints/share": 0, "skills/advantage": 0})


@pytest.mark.parametrize(
    ("card", "answer", "stated"),
    [
        ("so it is 12.", "12", True),
        ("S12", "12", False),
        ("112", "12", False),
        ("= -3", " -3 ", True),
        ("x^2+1", "x^2+1", True),
        ("anything", "", False),
        ("None", None, False),
    ],
)
def test_an_answer_is_stated_as_a_word(card, answer, stated):
    assert states_answer(card, answer) == stated


def test_the_terms_are_the_rewards_and_the_divergence_where_the_gate_is_open():
    rewards, hinted = [1.0, 0.0, 0.0, 0.0], [False, False, True, True]
    both = signals(rewards, groups=[0, 0, 1, 1], lengths=[2, 1, 1, 2], hinted=hinted)
    terms = method(None, "method.distill_weight=0.5", "method.advantage_std=none").terms(STEP, [], both)
    assert terms.divergence.tolist() == [0, 0, 0, 0.5, 0.5, 0.5], "a group that is all wrong has a signal"
    assert terms.advantage.tolist() == [0.5, 0.5, -0.5, 0, 0, 0] and not terms.sampled_kl.any()
    plain = [replace(one, hinted=False) for one in group(0, problem("a"), [1, 0])]
    assert not method().terms(STEP, plain, signals_of(plain)).divergence.any()


def test_the_gain_is_a_difference_of_means():
    assert mean_gain([1.0, 0.0, 1.0], [0.5, 0.0]) == pytest.approx(2 / 3 - 1 / 4)
