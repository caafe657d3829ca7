# Copyright (c) 2026 the megatron_selfdistill authors. Apache-2.0.
"""Renyi divergences of both directions, against float64 on full rows, in every form of the loss."""

from __future__ import annotations

import math

import pytest
import torch
import torch.distributed as dist
from ranks import RankPool
from torch import Tensor

from megatron_selfdistill.choices import FUSED_MODES
from megatron_selfdistill.loss import (
    Divergence,
    Target,
    TokenStats,
    VocabShard,
    distillation_loss,
    divergence,
    divergence_gradient,
    mixed_target,
)
from megatron_selfdistill.loss.sharded.fused_linear import fused_distillation_loss
from megatron_selfdistill.loss.target import unit_mix

VOCAB_SIZE, PADDED_VOCAB_SIZE, NUM_TOKENS = 150, 192, 12  # over 4 ranks: 48, 48, 48 and 6 valid columns
TARGETS = {
    "teacher alone": Target("teacher_alone", anchor="student"),
    "entropy matched": Target(anchor="student"),
    "geometric mean": Target("fixed", anchor="reference"),
}
ORDERS = [0.05, 0.5, 0.95, 0.9999, 1.0001, 1.5, 2.0, 4.0]
KINDS = [Divergence(kind, order=order) for kind in ("reverse_kl", "forward_kl") for order in ORDERS]
every_kind = pytest.mark.parametrize("kind", KINDS, ids=lambda kind: f"{kind.kind}-{kind.order:g}")


def rows() -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Return float32 logits of student, teacher and reference, [NUM_TOKENS, VOCAB_SIZE] each, and response tokens.

    Among the rows are equal and nearly equal models, ties, flat rows, far rows and huge logits.
    """
    generator = torch.Generator().manual_seed(8)
    scale = torch.linspace(0.3, 5.0, NUM_TOKENS)[:, None]
    student = scale * torch.randn(NUM_TOKENS, VOCAB_SIZE, generator=generator)
    teacher = student + torch.randn(student.shape, generator=generator)
    reference = student + 0.5 * torch.randn(student.shape, generator=generator)
    teacher[0] = reference[0] = student[0]
    teacher[1] = student[1] + 1e-3 * teacher[1]
    teacher[2] = reference[2] = 0.0
    student[3, :2] = teacher[3, 60:62] = 12.0
    teacher[4], reference[4] = 12 * teacher[4], 8 * reference[4]  # Z overflows float32 for orders above 1
    student[5] = 40 * student[5]
    student[6] += 8192.0
    teacher[7] -= 4096.0
    return student, teacher, reference, torch.randint(VOCAB_SIZE, (NUM_TOKENS,), generator=generator)


def by_definition(log_p: Tensor, log_q: Tensor, kind: Divergence) -> Tensor:
    first, other = (log_p, log_q) if kind.kind == "reverse_kl" else (log_q, log_p)
    return (kind.order * first + (1 - kind.order) * other).logsumexp(-1) / (kind.order - 1)


def expected(target: Target, kind: Divergence) -> tuple[Tensor, Tensor]:
    """Return the loss, and the gradient of the sum of `factors` times the loss, by autograd in float64."""
    student, teacher, reference, _ = (x.double() for x in rows())
    s = student.requires_grad_()
    log_q = mixed_target(s.detach(), teacher, target, reference if target.is_anchored else None).log_q
    loss = by_definition(s.log_softmax(-1), log_q, kind)
    (gradient,) = torch.autograd.grad((loss * factors()).sum(), s)
    return loss.detach(), gradient


def factors() -> Tensor:
    """Return a different incoming gradient for every token."""
    return torch.linspace(-0.5, 2.0, NUM_TOKENS)


def sharded(rule: str, kind: Divergence) -> tuple[TokenStats, Tensor]:
    """Return statistics and gradient of this rank's columns, with garbage in the padding."""
    target = TARGETS[rule]
    group = dist.group.WORLD if dist.is_initialized() and dist.get_world_size() > 1 else None
    vocab = VocabShard.from_group(PADDED_VOCAB_SIZE, VOCAB_SIZE, group)
    columns = slice(vocab.start, vocab.start + vocab.size)
    padding = torch.full((NUM_TOKENS, PADDED_VOCAB_SIZE - VOCAB_SIZE), 77.0)
    student, teacher, reference, tokens = rows()
    if target.is_anchored:
        teacher = unit_mix(reference, teacher, target.teacher_weight)
    s, t = (torch.cat([logits, padding], 1)[:, columns].clone() for logits in (student, teacher))
    stats = distillation_loss(s.requires_grad_(), t, tokens, target=target, divergence=kind, vocab=vocab)
    (stats.loss * factors()).sum().backward()
    assert s.grad is not None
    return stats.detached(), s.grad


def check(rule: str, kind: Divergence, stats: TokenStats, gradient: Tensor) -> None:
    """Assert that loss and gradient of all columns are those of `expected`."""
    loss, of_logits = expected(TARGETS[rule], kind)
    power = max(1.0, kind.order / abs(1 - kind.order)) if abs(kind.order - 1) > 1e-3 else 1.0
    torch.testing.assert_close(stats.loss.double(), loss, rtol=1e-4, atol=3e-6 * power)
    known = torch.ones(NUM_TOKENS, dtype=torch.bool)
    known[5] = False  # the float32 logits differ by hundreds, and their rounding is multiplied by the order
    ours = gradient[:, :VOCAB_SIZE].double()
    torch.testing.assert_close(ours[known], of_logits[known], rtol=1e-3, atol=4e-5)
    torch.testing.assert_close(ours[5], of_logits[5], rtol=1e-2, atol=1e-3)
    assert (gradient[:, VOCAB_SIZE:] == 0).all()


@every_kind
def test_value_and_gradient_on_full_rows_equal_the_definition(kind: Divergence) -> None:
    student, teacher, _, _ = (x.double() for x in rows())
    log_p, log_q = student.log_softmax(-1), teacher.log_softmax(-1)
    loss, gradient = expected(TARGETS["teacher alone"], kind)
    near = 1e-9 / abs(1 - kind.order) ** 0.5  # the definition loses digits near order 1
    torch.testing.assert_close(divergence(log_p, log_q, kind), loss, rtol=1e-10, atol=max(1e-11, near))
    ours = divergence_gradient(log_p, log_q, kind) * factors()[:, None]
    torch.testing.assert_close(ours, gradient, rtol=1e-8, atol=max(1e-10, near))
    assert ours.sum(-1).abs().max() < 1e-9


@every_kind
@pytest.mark.parametrize("rule", TARGETS)
def test_value_and_gradient_of_the_sharded_loss_equal_float64(rule: str, kind: Divergence) -> None:
    check(rule, kind, *sharded(rule, kind))


@pytest.mark.parametrize("direction", ["reverse_kl", "forward_kl"])
def test_the_limit_at_order_1_is_kl_and_the_orders_rise(direction: str) -> None:
    student, teacher, _, _ = (x.double() for x in rows())
    log_p, log_q = student.log_softmax(-1), teacher.log_softmax(-1)
    plain = Divergence(direction)
    for order in (1 - 1e-7, 1 + 1e-7):
        near = Divergence(direction, order=order)
        torch.testing.assert_close(
            divergence(log_p, log_q, near), divergence(log_p, log_q, plain), rtol=1e-3, atol=1e-9
        )
        gradients = (divergence_gradient(log_p, log_q, kind) for kind in (near, plain))
        torch.testing.assert_close(*gradients, rtol=1e-3, atol=1e-4)
    values = torch.stack([divergence(log_p, log_q, Divergence(direction, order=order)) for order in ORDERS])
    assert (values.diff(dim=0) >= -1e-12).all() and (values >= 0).all() and values[:, 0].abs().max() < 1e-12


def test_both_directions_are_one_family() -> None:
    """D_a(p || q) = a / (1 - a) D_(1 - a)(q || p) for orders between 0 and 1."""
    student, teacher, _, _ = (x.double() for x in rows())
    log_p, log_q = student.log_softmax(-1), teacher.log_softmax(-1)
    for order in (0.05, 0.3, 0.5, 0.9):
        reverse, forward = Divergence("reverse_kl", order=order), Divergence("forward_kl", order=1 - order)
        ratio = order / (1 - order)
        for of in (divergence, divergence_gradient):
            torch.testing.assert_close(
                of(log_p, log_q, reverse), ratio * of(log_p, log_q, forward), rtol=1e-9, atol=1e-10
            )


@every_kind
def test_columns_that_do_not_exist_take_no_part(kind: Divergence) -> None:
    student, teacher, _, tokens = rows()
    kept = torch.arange(VOCAB_SIZE) % 3 != 0
    found = []
    for s, t in (
        (student[:, kept], teacher[:, kept]),
        (student.masked_fill(~kept, -torch.inf), teacher.masked_fill(~kept, -torch.inf)),
    ):
        leaf = s.clone().requires_grad_()
        vocab = VocabShard(0, s.shape[1], s.shape[1])
        stats = distillation_loss(
            leaf, t, 0 * tokens, target=TARGETS["teacher alone"], divergence=kind, vocab=vocab, backend="torch"
        )
        stats.loss.sum().backward()
        found.append((stats.loss.detach(), leaf.grad))
    assert (found[1][1][:, ~kept] == 0).all()
    torch.testing.assert_close(found[1][0], found[0][0], rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(found[1][1][:, kept], found[0][1], rtol=1e-4, atol=1e-5)


def test_a_column_of_one_model_alone_is_infinite_for_orders_above_1_in_one_direction() -> None:
    both, one = torch.tensor([[0.5, 0.5, 0.0]]).log(), torch.tensor([[1.0, 0.0, 0.0]]).log()
    for order, wanted in ((0.5, math.log(2)), (2.0, math.inf)):
        value = divergence(both, one, Divergence("reverse_kl", order=order)).item()
        assert value == pytest.approx(wanted)
        assert divergence(one, both, Divergence("forward_kl", order=order)).item() == pytest.approx(wanted)
    assert divergence(one, both, Divergence("reverse_kl", order=2.0)).item() == pytest.approx(math.log(2))
    assert not divergence_gradient(both, one, Divergence("reverse_kl", order=2.0))[:, :2].isfinite().any()
    apart = torch.tensor([[1.0, 0.0]]).log(), torch.tensor([[0.0, 1.0]]).log()
    assert divergence(*apart, Divergence(order=0.5)).item() == math.inf


def test_a_row_with_nan_is_nan_alone() -> None:
    student, teacher, _, tokens = rows()
    student[8, 3] = torch.nan
    vocab, target = VocabShard(0, VOCAB_SIZE, VOCAB_SIZE), TARGETS["teacher alone"]
    stats = distillation_loss(student, teacher, tokens, target=target, divergence=Divergence(order=2.0), vocab=vocab)
    assert stats.loss.isnan().tolist() == [row == 8 for row in range(NUM_TOKENS)]


SPLIT = [("teacher alone", KINDS[1]), ("geometric mean", KINDS[6]), ("entropy matched", KINDS[13])]


def sharded_cases() -> list[tuple[TokenStats, Tensor]]:
    return [sharded(rule, kind) for rule, kind in SPLIT]


@pytest.mark.parametrize("world_size", [2, 4])
def test_shards_of_the_vocabulary_equal_float64(ranks: RankPool, world_size: int) -> None:
    per_rank = ranks.run(sharded_cases, world_size=world_size)
    for (rule, kind), *shards in zip(SPLIT, *per_rank, strict=True):
        assert all(torch.equal(shard[0].loss, shards[0][0].loss) for shard in shards)
        check(rule, kind, shards[0][0], torch.cat([shard[1] for shard in shards], 1))


@pytest.mark.parametrize("mode", FUSED_MODES)
def test_the_fused_layer_gives_the_gradients_of_the_materialised_logits(mode: str) -> None:
    generator = torch.Generator().manual_seed(1)
    student, teacher = (3 * torch.randn(NUM_TOKENS, 24, generator=generator) for _ in range(2))
    weight = torch.randn(VOCAB_SIZE, 24, generator=generator) / 5
    tokens, vocab = rows()[3], VocabShard(0, VOCAB_SIZE, VOCAB_SIZE)
    groups = [(5, Divergence("forward_kl")), (NUM_TOKENS - 5, Divergence(order=0.5))]
    options = {"target": TARGETS["teacher alone"], "divergence": groups, "vocab": vocab}
    found = []
    for fused in (True, False):
        hidden, w = student.clone().requires_grad_(), weight.clone().requires_grad_()
        if fused:
            stats = fused_distillation_loss(hidden, teacher, w, weight, tokens, mode=mode, chunk_tokens=4, **options)
        else:
            stats = distillation_loss(hidden @ w.T, teacher @ weight.T, tokens, **options)
        (stats.loss * factors()).sum().backward()
        found.append((stats.loss.detach(), hidden.grad, w.grad))
    for ours, theirs in zip(*found, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=3e-5, atol=1e-5)
