# Copyright (c) 2026 the megatron_selfdistill authors. Apache-2.0.
"""beta-OPSD: the recipe's target is the interpolation of the paper, and the credit of later tokens is a plain sum."""

from __future__ import annotations

import pytest
import torch
from logit_pairs import pair
from made_methods import composed
from term_arrays import coefficients, signals, tensor

from megatron_selfdistill.loss import Divergence, Target, VocabShard, distillation_loss, mixed_target
from megatron_selfdistill.methods.beta_opsd import credited, returns_to_go
from megatron_selfdistill.sources.signals import Clip

VALUES = [0.5, -1.0, 0.25, 2.0, -3.0, 0.0, 0.75, 1e-9, -0.125, 4.0, 1.5]
ROWS = [[1] * 11, [11], [1, 2, 8], [8, 1, 1, 1], [3, 4, 4]]
"""Lengths of the responses that the values belong to."""


def oracle(lengths: list[int], values: list[float], discount: float) -> list[float]:
    """Return the return-to-go of every token by two loops."""
    sums, start = [], 0
    for length in lengths:
        own = values[start : start + length]
        sums += [sum(discount ** (j - i) * own[j] for j in range(i, length)) for i in range(length)]
        start += length
    return sums


@pytest.mark.parametrize("lengths", ROWS, ids=str)
@pytest.mark.parametrize("discount", [0.0, 0.5, 0.9, 1.0])
def test_the_credit_of_later_tokens_is_their_discounted_sum_within_the_response(lengths, discount):
    given = signals([0.0] * len(lengths), groups=[2 * i for i in range(len(lengths))], lengths=lengths)
    found = returns_to_go(given, tensor(*VALUES), discount)
    torch.testing.assert_close(found, tensor(*oracle(lengths, VALUES, discount)), rtol=1e-13, atol=1e-14)


def test_advantages_are_log_ratios_of_target_and_sampler_and_0_without_a_hint():
    lengths, mu, q = [2, 3, 1], [-1.0, -2.0, -0.5, -1.0, -3.0, -0.25], [-0.5, -3.0, float("nan"), -9.0, 0.0, -2.25]
    given = signals([0.0] * 3, lengths=lengths, hinted=[True, False, True], mu=mu, q=q)
    terms = credited(given, weight=2.0, discount=0.5)
    assert terms.advantage.tolist() == pytest.approx([2 * (0.5 + 0.5 * -1.0), -2.0, 0.0, 0.0, 0.0, -4.0], abs=1e-15)
    assert not (terms.divergence.any() or terms.sampled_kl.any() or terms.likelihood.any())


def test_the_gradient_of_the_credit_is_that_of_the_clipped_objective():
    """Two tokens of one response in float64, whose ratios p / mu lie within and beyond the clip."""
    (s, _), mu, q = pair(7, num_rows=2, vocab_size=5), [-1.0, -1.5], [-0.25, -1.25]
    s = s.clone().requires_grad_()
    log_p = s.log_softmax(-1)[:, 2]
    ratios = (log_p - tensor(*mu)).exp()
    advantages = tensor(*oracle([2], [b - a for a, b in zip(mu, q, strict=True)], 0.5))
    objective = -torch.minimum(ratios * advantages, ratios.clamp(0.8, 1.2) * advantages)
    (wanted,) = torch.autograd.grad(objective.sum(), s, retain_graph=True)
    terms = credited(signals([0.0], lengths=[2], mu=mu, q=q), weight=1.0, discount=0.5)
    for token in range(2):
        one = type(terms).of(tensor(0.0), advantage=terms.advantage[token : token + 1])
        found = coefficients(one, mu=mu[token], q=q[token], clip=Clip(0.2, 0.2), p=log_p[token].item())
        (gradient,) = torch.autograd.grad(-found.policy.squeeze() * log_p[token], s, retain_graph=True)
        torch.testing.assert_close(gradient[token], wanted[token], rtol=1e-12, atol=1e-14)


@pytest.mark.parametrize("beta", [1.1, 2.0, 3.0, 17.0])
def test_the_target_and_its_gradient_are_those_of_the_interpolation(beta):
    """With w = 1 / (beta - 1): the target in float64, and the gradient of KL(p || q) in float32."""
    weight = 1 / (beta - 1)
    target = Target.configured(composed("recipe=beta_opsd", f"target.teacher_weight={weight}").target)
    (s, t), (r, _) = pair(1), pair(2)
    log_q = (t.log_softmax(-1) / beta + (1 - 1 / beta) * r.log_softmax(-1)).log_softmax(-1)
    torch.testing.assert_close(mixed_target(s, t, target, r).log_q, log_q, rtol=1e-12, atol=1e-12)
    logits = s.clone().requires_grad_()
    log_p = logits.log_softmax(-1)
    (wanted,) = torch.autograd.grad((log_p.exp() * (log_p - log_q)).sum(), logits)
    student = s.float().requires_grad_()
    mix = ((weight * t + r) / (1 + weight)).float()
    tokens, vocab = torch.zeros(len(s), dtype=torch.int64), VocabShard(0, s.shape[1], s.shape[1])
    loss = distillation_loss(student, mix, tokens, target=target, divergence=Divergence(), vocab=vocab).loss
    (found,) = torch.autograd.grad(loss.sum(), student)
    torch.testing.assert_close(found.double(), wanted, rtol=0, atol=2e-6)
