# Copyright (c) 2026 the megatron_selfdistill authors. Apache-2.0.
"""The gradient of the divergence and of the log-probs together equals float64 autograd, on logits and hidden states."""

from __future__ import annotations

import itertools
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch
import torch.distributed as dist
from fused_layer import Example, relative
from ranks import RankPool
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
    group: dist.ProcessGroup | None = None,
    *,
    given: tuple[Tensor, Tensor] | None = None,
    losses_of: Callable[[TokenStats], Tensor] | None = None,
    tokens: Tensor = TOKENS,
    inplace: bool = False,
) -> tuple[Tensor, Tensor]:
    """Return the losses, and the gradient of this rank's columns.

    given: w and a; losses_of: another function of the statistics to differentiate.
    """
    student, teacher, reference = rows(dtype)
    w, a = coefficients(len(tokens), dtype) if given is None else given
    of_target, reference_entropy = as_teacher(target, teacher, reference)
    vocab = VocabShard.from_group(PADDED_VOCAB_SIZE, VOCAB_SIZE, group)
    columns = slice(vocab.start, vocab.start + vocab.size)
    leaf = with_padding(student)[:, columns].clone().requires_grad_()
    logits = leaf * 1
    found: list[Tensor] = []
    logits.register_hook(found.append)
    stats = distillation_loss(
        logits,
        with_padding(of_target)[:, columns].clone(),
        tokens,
        target=target,
        divergence=kind,
        vocab=vocab,
        reference_entropy=reference_entropy,
        inplace_backward=inplace,
    )
    losses = (
        Coefficients(w, a).token_losses(stats.loss, stats.student_log_prob) if losses_of is None else losses_of(stats)
    )
    losses.sum().backward()
    assert (found[0].data_ptr() == logits.data_ptr()) == inplace
    assert (found[0][:, vocab.num_valid :] == 0).all(), "padding takes part in nothing"
    return losses.detach(), found[0][:, : vocab.num_valid]


@every_case
def test_loss_and_gradient_of_two_terms_equal_float64_autograd(rule: str, kind: str) -> None:
    w, a = coefficients(len(TOKENS), torch.float64)
    expected, gradient = expected_of(TARGETS[rule], DIVERGENCES[kind], w, a)
    losses, got = computed(TARGETS[rule], DIVERGENCES[kind])
    assert got.dtype == losses.dtype == torch.float64
    tolerance = 1e-12 if rule == "teacher alone" else FLOAT64_TOLERANCE
    torch.testing.assert_close(losses, expected, rtol=tolerance, atol=tolerance)
    torch.testing.assert_close(got, gradient, rtol=tolerance, atol=tolerance)


@every_case
def test_float32_logits_have_the_gradient_of_float64_to_float32s_rounding(rule: str, kind: str) -> None:
    student, teacher, reference = (logits.double() for logits in rows(torch.float32))
    w, a = coefficients(len(TOKENS), torch.float32)
    leaf = student.requires_grad_()
    expected = token_losses(leaf, teacher, reference, TOKENS, TARGETS[rule], DIVERGENCES[kind], w, a)
    (gradient,) = torch.autograd.grad(expected.sum(), leaf)
    losses, got = computed(TARGETS[rule], DIVERGENCES[kind], torch.float32)
    torch.testing.assert_close(losses.double(), expected.detach(), rtol=2e-5, atol=2e-5)
    torch.testing.assert_close(got.double(), gradient, rtol=1e-4, atol=5e-6)


def test_the_worked_example_of_four_columns() -> None:
    """s, t and the mix of the method with w = .75 on a vocabulary of 4; .3 and -.8 multiply the terms."""
    s, t, w, a = (
        torch.tensor(x, dtype=torch.float64) for x in ([[1.2, 0.3, -0.5, 0]], [[0.2, 1.5, -1, 0.4]], [0.3], [-0.8])
    )
    k = bisected_k(s, t)
    assert k == pytest.approx(1.2956268844, abs=1e-10)
    token = torch.tensor([1])
    for target, tolerance in ((Target("fixed", k=k, anchor="student"), 1e-11), (Target(anchor="student"), 1e-7)):
        leaf = s.clone().requires_grad_()
        stats = distillation_loss(leaf, t, token, target=target, divergence=Divergence(), vocab=VocabShard(0, 4, 4))
        loss = Coefficients(w, a).token_losses(stats.loss, stats.student_log_prob)
        loss.sum().backward()
        assert stats.student_log_prob.item() == pytest.approx(-1.536813518363, abs=1e-12)
        assert loss.item() == pytest.approx(-1.200940432120, abs=tolerance)
        expected = [-0.385342347369, 0.581529010558, -0.061502838520, -0.134683824668]
        assert leaf.grad is not None and leaf.grad[0].tolist() == pytest.approx(expected, abs=tolerance)


def bisected_k(s: Tensor, t: Tensor) -> float:
    def entropy(logits: Tensor) -> float:
        log_p = logits.log_softmax(-1)
        return -float((log_p.exp() * log_p).sum())

    low, high = 1.0, 1.75
    for _ in range(80):
        k = (low + high) / 2
        low, high = (k, high) if entropy((0.75 * t + s) / k) < entropy(s) else (low, k)
    return k


def all_cases() -> list[tuple[Tensor, Tensor]]:
    group = dist.group.WORLD if dist.get_world_size() > 1 else None
    return [computed(TARGETS[rule], DIVERGENCES[kind], group=group) for rule, kind in CASES]


@pytest.mark.parametrize("world_size", [2, pytest.param(4, marks=pytest.mark.full)])
def test_every_split_of_the_vocabulary_gives_the_gradient_of_float64(ranks: RankPool, world_size: int) -> None:
    w, a = coefficients(len(TOKENS), torch.float64)
    per_rank = ranks.run(all_cases, world_size=world_size)
    for (rule, kind), *shards in zip(CASES, *per_rank, strict=True):
        expected, gradient = expected_of(TARGETS[rule], DIVERGENCES[kind], w, a)
        for losses, _ in shards:
            assert torch.equal(losses, shards[0][0]), "the same bits on every rank"
            torch.testing.assert_close(losses, expected, rtol=FLOAT64_TOLERANCE, atol=FLOAT64_TOLERANCE)
        joined = torch.cat([shard[1] for shard in shards], 1)
        torch.testing.assert_close(joined, gradient, rtol=FLOAT64_TOLERANCE, atol=FLOAT64_TOLERANCE)


@pytest.mark.parametrize("kind", DIVERGENCES)
def test_backward_in_place_and_in_chunks_of_rows_writes_the_same_bits(
    kind: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    expected = computed(Target(anchor="student"), DIVERGENCES[kind], torch.float32)
    assert all(
        map(torch.equal, computed(Target(anchor="student"), DIVERGENCES[kind], torch.float32, inplace=True), expected)
    )
    limit = 3 * VOCAB_SIZE * 4
    monkeypatch.setattr(shard_sums, "CHUNK_BYTES", {"cpu": limit, "other": limit})
    assert all(
        map(torch.equal, computed(Target(anchor="student"), DIVERGENCES[kind], torch.float32, inplace=True), expected)
    )


def test_groups_of_tokens_with_different_divergences_have_the_gradients_of_each() -> None:
    counts = {"reverse": 3, "jsd": 5, "forward": 4}
    groups = [(count, DIVERGENCES[kind]) for kind, count in counts.items()]
    losses, gradient = computed(Target(anchor="student"), groups)
    start = 0
    for kind, count in counts.items():
        tokens = slice(start, start + count)
        expected = computed(Target(anchor="student"), DIVERGENCES[kind])
        torch.testing.assert_close(losses[tokens], expected[0][tokens], rtol=0, atol=1e-12)
        torch.testing.assert_close(gradient[tokens], expected[1][tokens], rtol=0, atol=1e-12)
        start += count


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


def fused_gradients(
    mode: str, tied: bool, target: Target, kind: Divergence, group: dist.ProcessGroup | None = None
) -> tuple[Tensor, Tensor, Tensor]:
    """Return the losses, dH and dW of this rank's rows, in float64."""
    example = Example(tied, torch.float64)
    vocab = VocabShard.from_group(PADDED_VOCAB_SIZE, VOCAB_SIZE, group)
    mine = slice(vocab.start, vocab.start + vocab.size)
    hidden, weight = example.student.clone().requires_grad_(), example.weight[mine].clone().requires_grad_()
    stats = fused_distillation_loss(
        hidden,
        example.teacher,
        weight,
        None if example.teacher_weight is None else example.teacher_weight[mine],
        example.tokens,
        target=target,
        divergence=kind,
        vocab=vocab,
        chunk_tokens=5,
        mode=mode,
    )
    w, a = coefficients(len(example.tokens), torch.float64)
    losses = Coefficients(w, a).token_losses(stats.loss, stats.student_log_prob)
    losses.sum().backward()
    assert hidden.grad is not None and weight.grad is not None
    return losses.detach(), hidden.grad, weight.grad


def expected_of_hidden_states(tied: bool, target: Target, kind: Divergence) -> tuple[Tensor, Tensor, Tensor]:
    example = Example(tied, torch.float64)
    of_teacher = example.weight if example.teacher_weight is None else example.teacher_weight
    hidden, weight = example.student.requires_grad_(), example.weight[:VOCAB_SIZE].clone().requires_grad_()
    teacher = example.teacher @ of_teacher[:VOCAB_SIZE].T
    w, a = coefficients(len(example.tokens), torch.float64)
    losses = token_losses(hidden @ weight.T, teacher, teacher, example.tokens, target, kind, w, a)
    return losses.detach(), *torch.autograd.grad(losses.sum(), (hidden, weight))


FUSED_CASES = [
    (tied, rule, kind) for tied in (True, False) for rule in ("capped", "teacher alone") for kind in DIVERGENCES
]


@pytest.mark.parametrize(("tied", "rule", "kind"), FUSED_CASES)
def test_the_fused_layer_in_low_memory_has_the_gradients_of_both_terms(tied: bool, rule: str, kind: str) -> None:
    expected = expected_of_hidden_states(tied, TARGETS[rule], DIVERGENCES[kind])
    losses, dgrad, wgrad = fused_gradients("low_memory", tied, TARGETS[rule], DIVERGENCES[kind])
    torch.testing.assert_close(losses, expected[0], rtol=1e-6, atol=1e-6)
    assert relative(dgrad, expected[1]) < 1e-6 and relative(wgrad[:VOCAB_SIZE], expected[2]) < 1e-6
    assert (wgrad[VOCAB_SIZE:] == 0).all()


def all_fused_cases() -> list[tuple[Tensor, Tensor, Tensor]]:
    return [
        fused_gradients("low_memory", tied, TARGETS[rule], DIVERGENCES[kind], dist.group.WORLD)
        for tied, rule, kind in FUSED_CASES
    ]


@pytest.mark.parametrize("world_size", [2, pytest.param(4, marks=pytest.mark.full)])
def test_the_fused_layer_in_low_memory_has_these_gradients_in_every_split(ranks: RankPool, world_size: int) -> None:
    per_rank = ranks.run(all_fused_cases, world_size=world_size)
    for (tied, rule, kind), *shards in zip(FUSED_CASES, *per_rank, strict=True):
        expected = expected_of_hidden_states(tied, TARGETS[rule], DIVERGENCES[kind])
        for losses, dgrad, _ in shards:
            torch.testing.assert_close(losses, expected[0], rtol=1e-6, atol=1e-6)
            assert relative(dgrad, expected[1]) < 1e-6
        assert relative(torch.cat([wgrad for *_, wgrad in shards])[:VOCAB_SIZE], expected[2]) < 1e-6


def test_the_fused_layer_that_keeps_a_gradient_refuses_the_gradient_of_the_log_probs() -> None:
    with pytest.raises(ValueError, match=r"keep_gradient holds the gradient of the divergence alone.* low_memory"):
        fused_gradients("keep_gradient", True, Target(anchor="student"), Divergence())


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
