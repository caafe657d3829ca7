# Copyright (c) 2026 the megatron_selfdistill authors. Apache-2.0.
"""TIP: the tokens that a step trains on and their weights, against plain Python and a float64 loss of chosen rows."""

from __future__ import annotations

import math
from types import SimpleNamespace

import pytest
import torch
from characters import Characters
from made_methods import given_with, made
from term_arrays import signals, tensor
from torch import Tensor

from megatron_selfdistill.loss import Divergence, Target, VocabShard, distillation_loss
from megatron_selfdistill.methods import tip
from megatron_selfdistill.methods.tip import importance, importance_weights
from megatron_selfdistill.sources.signals import Signals

ENTROPIES, DIVERGENCES = [2.0, 0.0, 1.0, 0.1, 0.0, 0.4], [0.0, 3.0, 0.3, 0.0, 0.0, 1.5]


def place(values: list[float], value: float) -> float:
    """Return the place of a value between the smallest and the largest of the finite ones."""
    finite = [each for each in values if math.isfinite(each)]
    low, high = min(finite), max(finite)
    return 0.0 if high == low else min(1.0, (value - low) / (high - low))


def published(entropies: list[float], divergences: list[float], share: float, score: str) -> list[float]:
    """Return the weights of the tokens with the highest scores: one loop per line of the published rule."""
    scores = []
    for one, other in zip(entropies, divergences, strict=True):
        h, d = place(entropies, one), place(divergences, other)
        scores.append({"soft_or": 1 - (1 - h) * (1 - d), "entropy": h, "divergence": d}[score])
    limit = sorted(scores, reverse=True)[max(1, math.floor(share * len(scores))) - 1]
    chosen = [each >= limit - 1e-15 for each in scores]
    return [len(scores) / sum(chosen) if one else 0.0 for one in chosen]


@pytest.mark.parametrize("score", ["soft_or", "entropy", "divergence"])
@pytest.mark.parametrize("share", [0.0, 0.2, 0.34, 0.5, 0.99, 1.0])
@pytest.mark.parametrize(
    ("entropies", "divergences"),
    [
        (ENTROPIES, DIVERGENCES),
        ([0.7] * 5, [0.0, 1.0, 2.0, 3.0, 4.0]),
        ([0.7] * 5, [0.2] * 5),
        ([0.5, 0.1, 0.3], [0.1, math.inf, 0.2]),
        ([1.0], [2.0]),
    ],
    ids=["both axes", "one entropy", "all alike", "an infinite divergence", "one token"],
)
def test_weights_are_those_of_the_published_rule(entropies, divergences, share, score):
    found = importance_weights(tensor(*entropies), tensor(*divergences), share=share, score=score)
    assert found.dtype == torch.float64
    torch.testing.assert_close(found, tensor(*published(entropies, divergences, share, score)), rtol=1e-12, atol=0)
    assert found.mean() == pytest.approx(1, abs=1e-12), "the loss is the mean over the chosen tokens"


def test_a_token_scores_high_if_it_is_uncertain_or_disagrees():
    found = importance(tensor(*ENTROPIES), tensor(*DIVERGENCES), "soft_or")
    assert found.tolist() == pytest.approx([1.0, 1.0, 1 - 0.5 * 0.9, 0.05, 0.0, 1 - 0.8 * 0.5], abs=1e-12)
    weights = importance_weights(tensor(*ENTROPIES), tensor(*DIVERGENCES), share=0.5)
    assert weights.tolist() == [2.0, 2.0, 0.0, 0.0, 0.0, 2.0]


def test_a_step_without_a_token_has_no_weights():
    assert importance_weights(tensor(), tensor(), share=0.5).tolist() == []


def measured(given: Signals, entropies: list[float], divergences: list[float]) -> Signals:
    """Return the signals with what a pass has measured."""
    numbers = {"student_entropy": tensor(*entropies), "divergence": tensor(*divergences)}
    return Signals(**{**vars(given), **numbers})


def test_tokens_of_all_replicas_compete_and_those_without_a_hint_do_not(monkeypatch):
    """This replica is the second of two; the first one has two tokens with the extremes of both axes."""
    other = torch.tensor([[4.0, 0.0], [0.0, 6.0]], dtype=torch.float64)
    monkeypatch.setattr(tip, "gather_objects", lambda own, group: [other, own])
    method = made(["recipe=tip"], given_with(Characters()))
    object.__setattr__(method.tools, "grid", SimpleNamespace(dp_group=None, dp_rank=1))
    own = measured(
        signals([0.0] * 3, lengths=[2, 1, 1], hinted=[True, False, True]), [2.0, 0.0, 9.0, 1.0], [0.0, 1.2, 9.0, 0.0]
    )
    terms = method.terms(0, [], own)
    wanted = published([4.0, 0.0, 2.0, 0.0, 1.0], [0.0, 6.0, 0.0, 1.2, 0.0], 0.5, "soft_or")
    assert terms.divergence.tolist() == [wanted[2], wanted[3], 0.0, wanted[4]] == [0.0, 0.0, 0.0, 0.0]
    method = made(["recipe=tip", "method.share=0.7"], given_with(Characters()))
    object.__setattr__(method.tools, "grid", SimpleNamespace(dp_group=None, dp_rank=1))
    terms = method.terms(0, [], own)
    assert terms.divergence.tolist() == pytest.approx([5 / 3, 0.0, 0.0, 0.0])
    assert not (terms.advantage.any() or terms.sampled_kl.any() or terms.likelihood.any())


def loss_of_chosen(s: Tensor, t: Tensor, count: int) -> Tensor:
    """Return the mean reverse KL of the rows with the highest scores, with a gradient to ``s``."""
    p, q = s.log_softmax(-1), t.log_softmax(-1)
    kl, entropy = (p.exp() * (p - q)).sum(-1), -(p.exp() * p).sum(-1)
    h, d = ((x - x.min()) / (x.max() - x.min()) for x in (entropy.detach(), kl.detach()))
    return kl[(h + d - h * d).topk(count).indices].mean()


def test_the_weighted_loss_and_its_gradient_are_those_of_the_chosen_rows():
    generator = torch.Generator().manual_seed(4)
    s, t = (3 * torch.randn(12, 7, generator=generator, dtype=torch.float64) for _ in "st")
    student, leaf = s.clone().requires_grad_(), s.clone().requires_grad_()
    (wanted,) = torch.autograd.grad(loss := loss_of_chosen(student, t, 6), student)
    target, vocab = Target("teacher_alone", anchor="student"), VocabShard(0, 7, 7)
    stats = distillation_loss(
        leaf, t, torch.zeros(12, dtype=torch.int64), target=target, divergence=Divergence(), vocab=vocab
    )
    weights = importance_weights(stats.student_entropy.detach(), stats.loss.detach(), share=0.5)
    found = (weights * stats.loss).mean()
    torch.testing.assert_close(found.detach(), loss.detach(), rtol=1e-11, atol=0)
    (gradient,) = torch.autograd.grad(found, leaf)
    torch.testing.assert_close(gradient, wanted, rtol=1e-11, atol=1e-14)
