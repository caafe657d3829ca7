# Copyright (c) 2026 the megatron_selfdistill authors. Apache-2.0.
"""EOPD: the recipe's loss is reverse KL, and forward KL beside it where the teacher is uncertain."""

from __future__ import annotations

import pytest
import torch
from characters import Characters
from made_methods import composed, given_with, made
from term_arrays import signals
from torch import Tensor

from megatron_selfdistill.config import ConfigError, load
from megatron_selfdistill.loss import Divergence, Target, VocabShard, distillation_loss


def rows() -> tuple[Tensor, Tensor]:
    """Return float64 logits [6, 9] of student and teacher, whose entropies lie between 0 and log 9."""
    generator = torch.Generator().manual_seed(2)
    s, t = (torch.randn(6, 9, generator=generator, dtype=torch.float64) for _ in "st")
    return s, torch.tensor([0.0, 0.5, 2.0, 4.0, 8.0, 30.0]).double()[:, None] * t


def published(s: Tensor, t: Tensor, tau: float) -> Tensor:
    """Return the loss of each row: KL(p || q), and where H(q) is above tau also KL(q || p)."""
    p, q = s.log_softmax(-1), t.log_softmax(-1)
    reverse, forward = (p.exp() * (p - q)).sum(-1), (q.exp() * (q - p)).sum(-1)
    return reverse + (-(q.exp() * q).sum(-1) > tau) * forward


@pytest.mark.parametrize("tau", [0.0, 0.8, 1.5, 100.0])
def test_value_and_gradient_are_those_of_the_published_rule(tau):
    config = composed("recipe=eopd", f"method.threshold={tau}")
    s, t = rows()
    student, leaf = s.clone().requires_grad_(), s.clone().requires_grad_()
    loss = published(student, t, tau)
    (wanted,) = torch.autograd.grad(loss.sum(), student)
    found = distillation_loss(
        leaf,
        t,
        torch.zeros(len(s), dtype=torch.int64),
        target=Target.configured(config.target),
        divergence=Divergence.configured(config.loss, config.method),
        vocab=VocabShard(0, s.shape[1], s.shape[1]),
    )
    torch.testing.assert_close(found.loss.detach(), loss.detach(), rtol=1e-11, atol=1e-12)
    found.loss.sum().backward()
    torch.testing.assert_close(leaf.grad, wanted, rtol=1e-11, atol=1e-12)


def test_the_recipe_has_the_published_threshold_and_weighs_the_tokens_with_a_hint_alike():
    config = composed("recipe=eopd")
    assert Divergence.configured(config.loss, config.method) == Divergence("reverse_kl", forward_above=0.8)
    assert (config.target.rule, config.teacher.weights) == ("teacher_alone", "frozen")
    assert not config.needs.rewards and not config.measures_log_probs
    method = made(["recipe=eopd"], given_with(Characters()))
    assert not method.weighs_tokens
    terms = method.terms(0, [], signals([0.0] * 2, lengths=[2, 1], hinted=[True, False]))
    assert terms.divergence.tolist() == [1, 1, 0]


def test_other_methods_leave_the_divergence_alone():
    config = composed("recipe=default")
    assert Divergence.configured(config.loss, config.method) == Divergence("reverse_kl")


@pytest.mark.parametrize("kind", ["forward_kl", "jsd"])
def test_another_divergence_is_refused(kind):
    with pytest.raises(ConfigError, match=f"adds forward KL to loss.divergence=reverse_kl, got {kind}"):
        load(["recipe=eopd", f"loss.divergence={kind}"])


@pytest.mark.parametrize("value", ["-1", "nan", "null"])
def test_a_threshold_out_of_range_is_refused(value):
    with pytest.raises(ConfigError, match=r"method\.threshold must be"):
        load(["recipe=eopd", f"method.threshold={value}"])
