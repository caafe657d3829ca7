# Copyright (c) 2026 the megatron_selfdistill authors. Apache-2.0.
"""The solver is accurate on every class of distributions; its ends, ties and floors are as documented."""

from __future__ import annotations

import distributions as tool
import pytest
import torch
from logit_pairs import entropy as entropy_of
from plateaus import CLASSES as PLATEAUS
from tiers import combinations
from torch import Tensor

from megatron_selfdistill.loss import Divergence, Status, Target, VocabShard, distillation_loss, mixed_target
from megatron_selfdistill.loss.target import MATCH_TOLERANCE

ROUNDED_ENTROPY = 4 * 8 * 2.0**-24
"""The error of an entropy of up to 8 nats in float32, after four roundings."""
ROUNDED_LOGIT = 2 * 20 * 2.0**-24
"""The error of a difference of logits of 20 in float32, and of its product with beta."""


def solve(student: Tensor, teacher: Tensor, target: Target) -> tuple[Tensor, Tensor]:
    vocab = VocabShard(0, student.shape[1], student.shape[1])
    tokens = torch.zeros(student.shape[0], dtype=torch.int64)
    stats = distillation_loss(student, teacher, tokens, target=target, divergence=Divergence(), vocab=vocab)
    return stats.beta, stats.status


TARGETS = {f"k_max={k}": Target(k_max=k, anchor="student") for k in ("1 + w", None, 2.0)}


@combinations(name=list(tool.DISTRIBUTIONS), target=TARGETS, strength=1)
def test_the_entropies_match_on_every_class_of_distributions(name: str, target: Target) -> None:
    for seed, vocab_size in ((0, 300), (1, 2048)):
        student, teacher = tool.draw(name, 16, vocab_size, seed)
        accuracy = tool.measure(student, teacher, target)
        assert accuracy.mismatch.max() <= MATCH_TOLERANCE + ROUNDED_ENTROPY
        scale = (accuracy.beta * target.geometric_k / 2).clamp(min=1.0)  # a large beta multiplies rounded logits
        assert (accuracy.normalisation / scale).max() <= ROUNDED_LOGIT
        assert (accuracy.reverse_kl / scale).max() <= 5e-6
        assert (accuracy.status != Status.UNCONVERGED).all()
        beta, status = solve(student, student, target)
        assert ((status == Status.MATCHED) | (status == Status.UNDETERMINED)).all()
        assert ((beta * 1.75 - 1)[status == Status.MATCHED].abs() <= 1e-6).all()


@pytest.mark.parametrize("name", tool.DISTRIBUTIONS)
def test_forward_kl_is_exact_also_where_the_last_step_of_the_solver_is_long(name: str) -> None:
    student, teacher = tool.draw(name, 16, 4096, 0)
    vocab, tokens = VocabShard(0, 4096, 4096), torch.zeros(16, dtype=torch.int64)
    arguments = {"target": Target(k_max=None, anchor="student"), "divergence": Divergence("forward_kl"), "vocab": vocab}
    stats = distillation_loss(student, teacher, tokens, **arguments)
    mix = student.double() + 0.75 * teacher.double()
    log_p, log_q = student.double().log_softmax(-1), (stats.beta.double()[:, None] * mix).log_softmax(-1)
    exact = torch.where(torch.isfinite(log_p), log_q.exp() * (log_q - log_p), 0.0).sum(-1)
    tolerance = 4e-6 if name in PLATEAUS else 2e-6  # where the last steps are the longest
    torch.testing.assert_close(stats.loss.double(), exact, rtol=1e-6, atol=tolerance)


@pytest.mark.parametrize("name", ["language model, bf16", "teacher sharper", "disagree"])
def test_the_entropies_match_on_a_large_vocabulary(name: str) -> None:
    student, teacher = tool.draw(name, 2, 152_064, 0)
    accuracy = tool.measure(student.bfloat16(), teacher.bfloat16(), Target(k_max=None, anchor="student"))
    assert accuracy.mismatch.max() <= MATCH_TOLERANCE + ROUNDED_ENTROPY
    assert accuracy.normalisation.max() <= ROUNDED_LOGIT


@pytest.mark.parametrize("target", TARGETS.values(), ids=TARGETS)
@pytest.mark.parametrize("name", tool.DISTRIBUTIONS)
def test_beta_and_status_equal_bisection(name: str, target: Target) -> None:
    student, teacher = tool.draw(name, 16, 2000, 7)
    beta, status = solve(student, teacher, target)
    reference = mixed_target(student.double(), teacher.double(), target)
    entropy = entropy_of(student.double().log_softmax(-1))
    agree = status == reference.status
    # H within rounding of a threshold may fall on either side of it
    on_threshold = (entropy_of(reference.log_q) - entropy).abs() < 2e-5
    assert (agree | on_threshold).all()
    sharp = (reference.status == Status.MATCHED) & (entropy > 1e-2)
    apart = (beta.double() / reference.beta).log().abs()
    # On a plateau many betas have one entropy: what is left of 1e-5 nats, over dH / d log beta = -Var_q(log q).
    variance = (reference.log_q.exp() * (reference.log_q + entropy_of(reference.log_q)[:, None]) ** 2).nansum(-1)
    assert (apart[sharp] <= 2e-5 + (torch.where(variance < 0.05, 1e-5, 0.0) / variance)[sharp]).all()
    outside = (reference.status == Status.CAPPED) | (reference.status == Status.OUT_OF_RANGE)
    torch.testing.assert_close(beta[outside & agree].double(), reference.beta[outside & agree], rtol=1e-6, atol=0)


def test_float64_logits_are_solved_beyond_float32() -> None:
    target = Target(k_max=None, anchor="student")
    for name in ("language model", "zipf", "teacher swaps the top two", "one-hot, H ~ 1e-4"):
        student, teacher = (x.double() for x in tool.draw(name, 16, 2000, 2))
        assert tool.measure(student, teacher, target).mismatch.max() <= 1e-8
