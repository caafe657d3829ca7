# Copyright (c) 2026 the megatron_selfdistill authors. Apache-2.0.
"""The gradient of the divergence and of the log-probs together equals float64 autograd, on logits and hidden states."""

from __future__ import annotations

import itertools
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch
from fused_layer import Example, relative
from torch import Tensor
from two_terms import (
    DIVERGENCES,
    PADDED_VOCAB_SIZE,
    TARGETS,
    TOKENS,
    VOCAB_SIZE,
    as_teacher,
    coefficients,
    rows,
    token_losses,
)

from megatron_selfdistill.choices import FUSED_MODES
from megatron_selfdistill.loss import Divergence, Target, TokenStats, VocabShard, distillation_loss
from megatron_selfdistill.loss.sharded import shard_sums, vocab_parallel
from megatron_selfdistill.loss.sharded.fused_linear import fused_distillation_loss
from megatron_selfdistill.loss.weighting import Coefficients

CASES = list(itertools.product(TARGETS, DIVERGENCES))
every_case = pytest.mark.parametrize(("rule", "kind"), CASES)
FLOAT64_TOLERANCE = 1e-6  # the solver leaves more than float64's rounding in beta


def expected_of(target: Target, kind: Divergence, w: Tensor, a: Tensor) -> tuple[Tensor, Tensor]:
    """Return the losses and the gradient by float64 autograd."""
    student, teacher, reference = rows(torch.float64)
    leaf = student.requires_grad_()
    losses = token_losses(leaf, teacher, reference, TOKENS, target, kind, w, a)
    (gradient,) = torch.autograd.grad(losses.sum(), leaf)
    return losses.detach(), gradient


def with_padding(logits: Tensor) -> Tensor:
    """Return the logits with the columns of the padding, which hold garbage."""
    garbage = torch.tensor([torch.nan, torch.inf, -torch.inf, 1e30, 55.0]).repeat(PADDED_VOCAB_SIZE)
    garbage = garbage[: PADDED_VOCAB_SIZE - VOCAB_SIZE].expand(len(logits), -1).to(logits.dtype)
    return torch.cat([logits, garbage], 1)


def computed(
    target: Target,
    kind: Any,
    dtype: torch.dtype = torch.float64,
    *,
    given: tuple[Tensor, Tensor] | None = None,
    losses_of: Callable[[TokenStats], Tensor] | None = None,
    tokens: Tensor = TOKENS,
) -> tuple[Tensor, Tensor]:
    """Return the losses, and the gradient of the logits.

    given: w and a; losses_of: another function of the statistics to differentiate.
    """
    student, teacher, reference = rows(dtype)
    w, a = coefficients(len(tokens), dtype) if given is None else given
    of_target, reference_entropy = as_teacher(target, teacher, reference)
    vocab = VocabShard(0, PADDED_VOCAB_SIZE, VOCAB_SIZE)
    leaf = with_padding(student).requires_grad_()
    stats = distillation_loss(
        leaf,
        with_padding(of_target),
        tokens,
        target=target,
        divergence=kind,
        vocab=vocab,
        reference_entropy=reference_entropy,
    )
    losses = (
        Coefficients(w, a).token_losses(stats.loss, stats.student_log_prob) if losses_of is None else losses_of(stats)
    )
    losses.sum().backward()
    assert leaf.grad is not None and (leaf.grad[:, VOCAB_SIZE:] == 0).all(), "padding takes part in nothing"
    return losses.detach(), leaf.grad[:, :VOCAB_SIZE]


@every_case
def test_loss_and_gradient_of_two_terms_equal_float64_autograd(rule: str, kind: str) -> None:
    w, a = coefficients(len(TOKENS), torch.float64)
    expected, gradient = expected_of(TARGETS[rule], DIVERGENCES[kind], w, a)
    losses, got = computed(TARGETS[rule], DIVERGENCES[kind])
    assert got.dtype == losses.dtype == torch.float64
    tolerance = 1e-12 if rule == "teacher alone" else FLOAT64_TOLERANCE
    torch.testing.assert_close(losses, expected, rtol=tolerance, atol=tolerance)
    torch.testing.assert_close(got, gradient, rtol=tolerance, atol=tolerance)


@pytest.mark.parametrize("kind", DIVERGENCES)
def test_the_log_prob_alone_has_its_own_gradient(kind: str) -> None:
    """onehot(token) - p, where nothing uses the loss."""
    _, got = computed(Target(anchor="student"), DIVERGENCES[kind], losses_of=lambda stats: stats.student_log_prob)
    expected = -rows(torch.float64)[0].softmax(-1)
    expected[torch.arange(len(TOKENS)), TOKENS] += 1
    torch.testing.assert_close(got, expected, rtol=0, atol=1e-13)


@pytest.mark.parametrize("kind", DIVERGENCES)
def test_without_a_use_of_the_log_probs_the_backend_writes_the_gradient_of_the_loss_alone(
    kind: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    terms: list[object] = []

    def write(*arguments: Any) -> None:
        terms.append(arguments[6])
        shard_sums.write_gradient(*arguments)

    monkeypatch.setattr(vocab_parallel, "_TORCH", replace(vocab_parallel._TORCH, write_gradient=write))
    w, a = coefficients(len(TOKENS), torch.float64)
    _, alone = computed(
        Target(anchor="student"), DIVERGENCES[kind], losses_of=lambda stats: Coefficients(w).token_losses(stats.loss, a)
    )
    assert terms == [None]
    _, with_zeros = computed(Target(anchor="student"), DIVERGENCES[kind], given=(w, torch.zeros_like(a)))
    assert terms[1] is not None and torch.equal(with_zeros, alone)


def test_a_token_that_is_no_valid_column_needs_a_coefficient_of_zero() -> None:
    tokens = TOKENS.clone()
    tokens[:7] = torch.tensor([370, 511, -100, 512, 10**6, -1, 5])
    w, a = (torch.ones(len(tokens), dtype=torch.float64) for _ in range(2))
    a[:3] = 0
    losses, gradient = computed(Target(anchor="student"), Divergence(), given=(w, a), tokens=tokens)
    plain, expected = computed(Target(anchor="student"), Divergence(), given=(w, torch.zeros_like(a)))
    assert torch.equal(losses[:3], plain[:3]) and torch.equal(gradient[:3], expected[:3])
    assert losses[3:6].isnan().all() and gradient[3:6].isnan().all()
    assert losses[6:].isfinite().all() and gradient[6:].isfinite().all()


@pytest.mark.parametrize("mode", FUSED_MODES)
def test_the_fused_layer_has_a_gradient_where_nothing_uses_the_loss_or_nothing_uses_the_log_probs(mode: str) -> None:
    example = Example(True, torch.float64)
    used = {"loss": lambda stats: stats.loss, "log prob": lambda stats: stats.student_log_prob}
    for name, of in used.items():
        hidden = example.student.clone().requires_grad_()
        stats = fused_distillation_loss(
            hidden,
            example.teacher,
            example.weight,
            None,
            example.tokens,
            target=Target("teacher_alone", anchor="student"),
            divergence=Divergence(),
            vocab=VocabShard(0, PADDED_VOCAB_SIZE, VOCAB_SIZE),
            mode=mode,
        )
        if name == "log prob" and mode == "keep_gradient":
            with pytest.raises(ValueError, match=r"keep_gradient holds the gradient of the divergence alone"):
                of(stats).sum().backward()
            continue
        of(stats).sum().backward()
        teacher = example.teacher @ example.weight[:VOCAB_SIZE].T
        zeros, ones = (torch.full((len(example.tokens),), float(i)).double() for i in range(2))
        leaf = example.student.clone().requires_grad_()
        coefficients_of = (ones, zeros) if name == "loss" else (zeros, -ones)
        logits = leaf @ example.weight[:VOCAB_SIZE].T
        arguments = logits, teacher, teacher, example.tokens, Target("teacher_alone", anchor="student"), Divergence()
        token_losses(*arguments, *coefficients_of).sum().backward()
        assert leaf.grad is not None and relative(hidden.grad, leaf.grad) < 1e-12
