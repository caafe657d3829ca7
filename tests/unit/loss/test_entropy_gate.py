# Copyright (c) 2026 the megatron_selfdistill authors. Apache-2.0.
"""Forward KL that is added where the target is uncertain, against float64 on full rows, in every form of the loss."""

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

VOCAB_SIZE, PADDED_VOCAB_SIZE, NUM_TOKENS = 150, 192, 14  # over 4 ranks: 48, 48, 48 and 6 valid columns
PAIR, FOUR = 2, 4
"""The rows whose target has 2 and 4 tied columns and nothing else: H(q) is exactly log 2 and log 4."""
TARGETS = {
    "teacher alone": Target("teacher_alone", anchor="student"),
    "entropy matched": Target(anchor="student"),
    "geometric mean": Target("fixed", anchor="reference"),
}
GATES = {"log 2": math.log(2), "log 4": math.log(4), "0.8": 0.8, "all": -1.0, "none": math.inf}
cases = pytest.mark.parametrize(("rule", "gate"), [(rule, gate) for rule in TARGETS for gate in GATES])


def rows() -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Return float32 logits of student, teacher and reference, [NUM_TOKENS, VOCAB_SIZE] each, and response tokens.

    Among the rows are equal models, targets of tied columns alone, flat rows, forks, sharp rows and huge logits.
    """
    generator = torch.Generator().manual_seed(5)
    scale = torch.linspace(0.3, 6.0, NUM_TOKENS)[:, None]
    student = scale * torch.randn(NUM_TOKENS, VOCAB_SIZE, generator=generator)
    teacher = student + torch.randn(student.shape, generator=generator)
    reference = student + 0.5 * torch.randn(student.shape, generator=generator)
    teacher[0] = reference[0] = student[0]
    for row, tied in ((PAIR, 2), (FOUR, 4)):
        teacher[row] = -200.0
        teacher[row, 40 : 40 + 20 * tied : 20] = 0.0  # over two or three shards
        reference[row] = student[row] = teacher[row]
        student[row, 40] = 1.0
    teacher[6] = reference[6] = 0.0
    teacher[7, :3], reference[7, :3] = torch.tensor([30.0, 30.0, 28.0]), 30.0
    teacher[9], reference[9] = 20 * teacher[9], 20 * teacher[9]
    student[10] += 8192.0
    teacher[11] -= 4096.0
    reference[12] *= 30
    return student, teacher, reference, torch.randint(VOCAB_SIZE, (NUM_TOKENS,), generator=generator)


def kl(a: Tensor, b: Tensor) -> Tensor:
    return (a.exp() * (a - b)).sum(-1)


def uncertain(log_q: Tensor, above: float) -> Tensor:
    """Return which rows of float64 have more entropy than ``above``; no row but the tied ones lies near it."""
    entropy = -(log_q.exp() * log_q).sum(-1)
    exact = {row: math.log(tied) for row, tied in ((PAIR, 2), (FOUR, 4)) if abs(entropy[row] - math.log(tied)) < 1e-6}
    gated = entropy > above
    for row, value in exact.items():
        gated[row] = value > above
    others = [row for row in range(len(log_q)) if row not in exact]
    assert (entropy[others] - above).abs().min() > 1e-3
    return gated


def by_definition(target: Target, above: float, mix: Tensor | None = None) -> tuple[Tensor, Tensor, Tensor]:
    """Return loss, gated tokens, and the gradient of the sum of `factors` times the loss; float64.

    ``mix``: the logits of the target, if the loss gets their float32 rounding; a row at -4096 loses 2e-4 of each.
    """
    student, teacher, reference, _ = (x.double() for x in rows())
    s = student.requires_grad_()
    if mix is None:
        log_q = mixed_target(s.detach(), teacher, target, reference if target.is_anchored else None).log_q
    else:
        log_q = mix.double().log_softmax(-1)
    gated, log_p = uncertain(log_q, above), s.log_softmax(-1)
    loss = kl(log_p, log_q) + torch.where(gated, kl(log_q, log_p), 0.0)
    (gradient,) = torch.autograd.grad((loss * factors()).sum(), s)
    return loss.detach(), gated, gradient


def factors() -> Tensor:
    """Return a different incoming gradient for every token."""
    return torch.linspace(-0.5, 2.0, NUM_TOKENS)


def given(target: Target) -> tuple[Tensor, Tensor, Tensor]:
    """Return the logits that the loss receives, and the response tokens: with a reference the mix comes as teacher."""
    student, teacher, reference, tokens = rows()
    return student, unit_mix(reference, teacher, target.teacher_weight) if target.is_anchored else teacher, tokens


def sharded(rule: str, gate: str) -> tuple[TokenStats, Tensor]:
    """Return statistics and gradient of this rank's columns, with garbage in the padding."""
    group = dist.group.WORLD if dist.is_initialized() and dist.get_world_size() > 1 else None
    vocab = VocabShard.from_group(PADDED_VOCAB_SIZE, VOCAB_SIZE, group)
    columns = slice(vocab.start, vocab.start + vocab.size)
    padding = torch.full((NUM_TOKENS, PADDED_VOCAB_SIZE - VOCAB_SIZE), 77.0)
    student, teacher, tokens = given(TARGETS[rule])
    s, t = (torch.cat([logits, padding], 1)[:, columns].clone() for logits in (student, teacher))
    kind = Divergence(forward_above=GATES[gate])
    stats = distillation_loss(s.requires_grad_(), t, tokens, target=TARGETS[rule], divergence=kind, vocab=vocab)
    (stats.loss * factors()).sum().backward()
    assert s.grad is not None
    return stats.detached(), s.grad


def check(rule: str, gate: str, stats: TokenStats, gradient: Tensor) -> None:
    """Assert that loss and gradient of all columns are those of `by_definition`."""
    target = TARGETS[rule]
    loss, gated, expected = by_definition(target, GATES[gate], given(target)[1] if target.is_anchored else None)
    torch.testing.assert_close(stats.loss.double(), loss, rtol=2e-5, atol=2e-5)
    torch.testing.assert_close(gradient[:, :VOCAB_SIZE].double(), expected, rtol=2e-4, atol=4e-5)
    assert (gradient[:, VOCAB_SIZE:] == 0).all()
    some = stats.loss > 1e-6  # one KL of less may be rounded to zero
    alone = stats.loss == stats.reverse_kl
    assert torch.equal(alone[some], ~gated[some]), "a token below the threshold has reverse KL alone"


@cases
def test_value_and_gradient_on_full_rows_equal_the_definition(rule: str, gate: str) -> None:
    target, kind = TARGETS[rule], Divergence(forward_above=GATES[gate])
    student, teacher, reference, _ = (x.double() for x in rows())
    log_q = mixed_target(student, teacher, target, reference if target.is_anchored else None).log_q
    loss, _, gradient = by_definition(target, kind.forward_above)
    log_p = student.log_softmax(-1)
    known = torch.ones(NUM_TOKENS, dtype=torch.bool)
    known[[PAIR, FOUR]] = rule == "teacher alone"  # a mix rounds the entropy of its ties
    torch.testing.assert_close(divergence(log_p, log_q, kind)[known], loss[known], rtol=1e-11, atol=1e-11)
    ours = divergence_gradient(log_p, log_q, kind) * factors()[:, None]
    torch.testing.assert_close(ours[known], gradient[known], rtol=1e-10, atol=1e-11)


@cases
def test_value_and_gradient_of_the_sharded_loss_equal_float64(rule: str, gate: str) -> None:
    check(rule, gate, *sharded(rule, gate))


def test_an_entropy_of_exactly_the_threshold_adds_nothing() -> None:
    for row, tied, gate in ((PAIR, 2, "log 2"), (FOUR, 4, "log 4")):
        stats, gradient = sharded("teacher alone", gate)
        assert stats.target_entropy[row] == torch.tensor(math.log(tied)) and stats.loss[row] == stats.reverse_kl[row]
        below = Divergence(forward_above=math.log(tied) - 1e-6)
        student, teacher, tokens = given(TARGETS["teacher alone"])
        arguments = {"target": TARGETS["teacher alone"], "vocab": VocabShard(0, VOCAB_SIZE, VOCAB_SIZE)}
        added = distillation_loss(student, teacher, tokens, divergence=below, **arguments)
        assert added.loss[row] > stats.loss[row] + 0.05 and gradient.isfinite().all()


def sharded_cases() -> list[tuple[TokenStats, Tensor]]:
    return [sharded(rule, gate) for rule in TARGETS for gate in ("log 2", "0.8")]


@pytest.mark.parametrize("world_size", [2, 4])
def test_shards_of_the_vocabulary_choose_alike_and_equal_float64(ranks: RankPool, world_size: int) -> None:
    per_rank = ranks.run(sharded_cases, world_size=world_size)
    names = [(rule, gate) for rule in TARGETS for gate in ("log 2", "0.8")]
    for (rule, gate), *shards in zip(names, *per_rank, strict=True):
        assert all(torch.equal(shard[0].loss, shards[0][0].loss) for shard in shards)
        check(rule, gate, shards[0][0], torch.cat([shard[1] for shard in shards], 1))


def test_float64_logits_equal_float64_to_its_digits() -> None:
    student, teacher, _, tokens = rows()
    leaf = student.double().requires_grad_()
    vocab, kind = VocabShard(0, VOCAB_SIZE, VOCAB_SIZE), Divergence(forward_above=0.8)
    target = TARGETS["teacher alone"]
    stats = distillation_loss(leaf, teacher.double(), tokens, target=target, divergence=kind, vocab=vocab)
    (stats.loss * factors()).sum().backward()
    loss, _, gradient = by_definition(target, 0.8)
    torch.testing.assert_close(stats.loss.detach(), loss, rtol=1e-11, atol=1e-11)
    torch.testing.assert_close(leaf.grad, gradient, rtol=1e-10, atol=1e-11)


@pytest.mark.parametrize("mode", FUSED_MODES)
@pytest.mark.parametrize("chunk_tokens", [4, 64])
def test_the_fused_layer_gives_the_gradients_of_the_materialised_logits(mode: str, chunk_tokens: int) -> None:
    """Hidden states are the logits' coefficients of an orthonormal weight; groups mix gated tokens with others."""
    generator = torch.Generator().manual_seed(1)
    weight = torch.linalg.qr(torch.randn(VOCAB_SIZE, 24, generator=generator)).Q.contiguous()
    student, teacher = (8 * torch.randn(NUM_TOKENS, 24, generator=generator) for _ in range(2))
    _, _, _, tokens = rows()
    log_q = (teacher @ weight.T).log_softmax(-1)
    above = -(log_q.exp() * log_q).sum(-1)[5:].sort().values[3:5].mean().item()
    groups = [(5, Divergence("forward_kl")), (NUM_TOKENS - 5, Divergence(forward_above=above))]
    target, vocab = Target("teacher_alone", anchor="student"), VocabShard(0, VOCAB_SIZE, VOCAB_SIZE)
    found = []
    for fused in (True, False):
        hidden, w = student.clone().requires_grad_(), weight.clone().requires_grad_()
        options = {"target": target, "divergence": groups, "vocab": vocab}
        if fused:
            stats = fused_distillation_loss(
                hidden, teacher, w, weight, tokens, mode=mode, chunk_tokens=chunk_tokens, **options
            )
        else:
            stats = distillation_loss(hidden @ w.T, teacher @ weight.T, tokens, **options)
        (stats.loss * factors()).sum().backward()
        found.append((stats.loss.detach(), hidden.grad, w.grad))
        assert (stats.target_entropy[5:] > above).sum() in (4, 5), "the example has tokens of both kinds"
    # A probability has the relative error of its logit's last bit; a gradient multiplies it by the other factor.
    logits = max((hidden @ weight.T).abs().max().item() for hidden in (student, teacher))
    error = 2**-23 * logits * factors().abs().max().item()
    for ours, theirs, factor in zip(*found, (1.0, weight.abs().max().item(), student.abs().max().item()), strict=True):
        torch.testing.assert_close(ours, theirs, rtol=2e-5, atol=error * factor)


def test_the_log_prob_of_the_response_token_keeps_its_own_gradient() -> None:
    student, teacher, tokens = given(TARGETS["teacher alone"])
    vocab, target = VocabShard(0, VOCAB_SIZE, VOCAB_SIZE), TARGETS["teacher alone"]
    found = []
    for kinds in ([Divergence(forward_above=0.8)], [Divergence("reverse_kl"), Divergence("forward_kl")]):
        leaf = student.clone().requires_grad_()
        for i, kind in enumerate(kinds):
            stats = distillation_loss(leaf, teacher, tokens, target=target, divergence=kind, vocab=vocab)
            gate = (stats.target_entropy > 0.8) if i else torch.ones(NUM_TOKENS)
            own = stats.student_log_prob.sum() if i == 0 else 0.0
            ((stats.loss * gate * factors()).sum() + own).backward()
        found.append(leaf.grad)
    torch.testing.assert_close(*found, rtol=2e-5, atol=2e-6)
