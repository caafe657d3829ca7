# Copyright (c) 2026 the megatron_selfdistill authors. Apache-2.0.
"""Every target and divergence of a token against float64: of logits and hidden states, on any shards and backend."""

from __future__ import annotations

import math
from collections.abc import Sequence
from itertools import cycle
from typing import NamedTuple

import pytest
import torch
import torch.distributed as dist
from kernel_cases import BACKEND, DEVICE, every_backend, on_cpu
from logit_pairs import by_bisection, divergence, entropy, with_garbage
from ranks import RankPool
from torch import Tensor

from megatron_selfdistill.choices import FUSED_MODES
from megatron_selfdistill.loss import (
    Divergence,
    Status,
    Target,
    TokenStats,
    VocabShard,
    distillation_loss,
)
from megatron_selfdistill.loss.sharded.fused_linear import fused_distillation_loss
from megatron_selfdistill.loss.sharded.vocab_parallel import vocab_entropy

VOCAB_SIZE, PADDED_VOCAB_SIZE = 150, 192  # over 4 ranks: 48, 48, 48 and 6 valid columns
NUM_TOKENS, WIDTH = 12, 16
TIED = 4
"""The row of teacher and reference without differences, for which every beta gives the same target."""
WEIGHTS = torch.tensor([0.75, 2.0, 0.25, 0.75, 2.0, 0.3] * 2, dtype=torch.float64)
REVERSE, FORWARD, JSD = Divergence("reverse_kl"), Divergence("forward_kl"), Divergence("jsd", 0.3)


class Case(NamedTuple):
    """The target, the divergence, and whether each token has its own w."""

    target: Target
    divergence: Divergence
    has_weights: bool = False

    @property
    def tolerance(self) -> float:
        """The factor by which a Renyi divergence multiplies errors of log-probabilities."""
        order = self.divergence.order
        return max(1.0, order / abs(1 - order)) if self.divergence.is_renyi and abs(order - 1) > 1e-3 else 1.0


STUDENT_ALONE, MATCHED, GEOMETRIC = (
    Target("teacher_alone", anchor="student"),
    Target(anchor="student"),
    Target("fixed", anchor="reference"),
)
RENYI = [(k, a) for k in ("reverse_kl", "forward_kl") for a in (0.05, 0.5, 0.95, 0.9999, 1.0001, 1.5, 2.0, 4.0)]
CASES = {
    **{f"mix, {kind.kind}": Case(MATCHED, kind) for kind in (REVERSE, FORWARD, JSD)},
    **{f"given k, {kind.kind}": Case(Target("fixed", k=1.3, anchor="student"), kind) for kind in (REVERSE, JSD)},
    "reference's entropy": Case(Target(), REVERSE),
    "reference's entropy, strict": Case(Target(k_max=None), FORWARD),
    "student's entropy": Case(Target(match="student", teacher_weight=2.0), JSD),
    "student's entropy, strict": Case(Target(match="student", k_max=None), REVERSE),
    "geometric mean": Case(GEOMETRIC, FORWARD),
    "k 1.3": Case(Target("fixed", k=1.3), JSD),
    "batch": Case(Target("batch", k=1.9, k_max=None), REVERSE),
    "own weights": Case(Target(), FORWARD, True),
    "own weights, strict": Case(Target(match="student", k_max=None), REVERSE, True),
    "own weights, geometric mean": Case(GEOMETRIC, JSD, True),
    **{
        f"forward KL above {above} of {name}": Case(target, Divergence(forward_above=above))
        for name, target in (("the teacher", STUDENT_ALONE), ("a mix", MATCHED), ("a mean", GEOMETRIC))
        for above in (0.8, -1.0, float("inf"))
    },
    **{
        f"order {order} of {kind}": Case(target, Divergence(kind, order=order))
        for (kind, order), target in zip(RENYI, cycle((STUDENT_ALONE, MATCHED, GEOMETRIC)), strict=False)
    },
}
Found = tuple[TokenStats, Tensor]
"""The statistics, and the gradient of this rank's columns."""


def rows() -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Return float32 logits of equal and nearly equal models, forks, ties, far models and huge logits, and tokens."""
    generator = torch.Generator().manual_seed(11)
    scale = torch.linspace(0.3, 5.0, NUM_TOKENS)[:, None]
    reference = scale * torch.randn(NUM_TOKENS, VOCAB_SIZE, generator=generator)
    teacher = reference + torch.randn(reference.shape, generator=generator)
    student = reference + 0.5 * torch.randn(reference.shape, generator=generator)
    student[0] = teacher[0] = reference[0]
    student[1], teacher[1] = reference[1] + 1e-3 * student[1], reference[1] - 1e-3 * teacher[1]
    teacher[2] = 12 * reference[2]
    reference[3, :2] = teacher[3, 60:62] = 20.0  # two forks, with other columns
    reference[TIED] = teacher[TIED] = 0.0
    student[5] += 8192.0
    return student, teacher, reference, torch.randint(VOCAB_SIZE, (NUM_TOKENS,), generator=generator)


def total(loss: Tensor, log_prob: Tensor, mode: str = "low_memory") -> Tensor:
    """Return the number that backward starts from: each token has other coefficients of both terms."""
    divergences = loss * torch.linspace(-0.5, 2.0, NUM_TOKENS, dtype=loss.dtype)
    if mode == "keep_gradient":  # holds the gradient of the divergence alone
        return divergences.sum()
    return (divergences + log_prob * torch.linspace(1.5, -1.0, NUM_TOKENS, dtype=loss.dtype)).sum()


def of_tokens(logits: Tensor) -> Tensor:
    return logits.log_softmax(-1).gather(1, rows()[3][:, None])[:, 0]


def by_definition(case: Case, s: Tensor, t: Tensor, r: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Return loss [NUM_TOKENS], log q and beta of float64 logits; the loss has a gradient to the student's."""
    log_q, beta = by_bisection(s.detach(), t, case.target, r, weights=WEIGHTS if case.has_weights else None)
    return divergence(s.log_softmax(-1), log_q, case.divergence), log_q, beta


def mixed(case: Case, teacher: Tensor, reference: Tensor) -> Tensor:
    """Return the logits or states that the loss takes as the teacher's: with a reference (w t + r) / (1 + w)."""
    if not case.target.is_anchored:
        return teacher
    w = WEIGHTS[:, None] if case.has_weights else torch.tensor(case.target.teacher_weight, dtype=torch.float64)
    return ((w * teacher.double() + reference.double()) / (1 + w)).to(teacher.dtype)


def shard() -> tuple[VocabShard, slice]:
    group = dist.group.WORLD if dist.is_initialized() and dist.get_world_size() > 1 else None
    vocab = VocabShard.from_group(PADDED_VOCAB_SIZE, VOCAB_SIZE, group)
    return vocab, slice(vocab.start, vocab.start + vocab.size)


def of_logits(case: Case) -> Found:
    """Return the loss of this rank's columns, with garbage in the padding, overwritten by their gradient."""
    (vocab, columns), (student, teacher, reference, tokens) = shard(), rows()
    s, m, r = (
        with_garbage(logits, PADDED_VOCAB_SIZE)[:, columns].to(DEVICE, copy=True)
        for logits in (student, mixed(case, teacher, reference), reference)
    )
    leaf = s.requires_grad_()
    stats = distillation_loss(
        leaf.view_as(leaf),
        m,
        tokens.to(DEVICE),
        target=case.target,
        divergence=case.divergence,
        vocab=vocab,
        reference_entropy=vocab_entropy(r, vocab, backend=BACKEND) if case.target.needs_reference_entropy else None,
        teacher_weights=WEIGHTS.to(DEVICE) if case.has_weights else None,
        inplace_backward=True,
        backend=BACKEND,
    )
    total(stats.loss.cpu(), stats.student_log_prob.cpu()).backward()
    assert s.grad is not None and stats.teacher_entropy.isnan().all() == case.target.is_anchored
    return on_cpu(stats), s.grad.cpu()


def check(name: str, shards: Sequence[Found]) -> None:
    student, teacher, reference, _ = (logits.double() for logits in rows())
    case, s = CASES[name], student.clone().requires_grad_()
    expected, log_q, beta = by_definition(case, s, teacher, reference)
    (gradient,) = torch.autograd.grad(total(expected, of_tokens(s)), s)
    stats, more = shards[0][0], case.tolerance
    assert all(torch.equal(other.loss, stats.loss) for other, _ in shards), "ranks differ"
    known = stats.status != Status.UNDETERMINED
    matters = known & (torch.arange(NUM_TOKENS) != TIED)
    assert matters.sum() >= 8
    ours, rtol = torch.cat([shard[1] for shard in shards], 1), 2e-5 if more == 1 else 1e-4
    for got, wanted, rows_, of_got, least in (
        (stats.beta, beta, matters, 2e-4, 0.0),
        (stats.loss, expected.detach(), known, rtol, 2e-5 * more),
        (ours[:, :VOCAB_SIZE], gradient, known, 10 * rtol, 4e-5 * more),
        (stats.student_entropy, entropy(s.detach().log_softmax(-1)), known, 1e-5, 2e-5),
        (stats.target_entropy, entropy(log_q), known, 1e-5, 2e-5),
    ):
        error = {"rtol": of_got, "atol": least, "msg": lambda text: f"{name}: {text}"}
        torch.testing.assert_close(got.double()[rows_], wanted[rows_], **error)
    assert (ours[:, VOCAB_SIZE:] == 0).all()


@every_backend(cases=12, quick=2)
@pytest.mark.parametrize("name", CASES)
def test_loss_gradient_and_k_of_logits_equal_float64(name: str) -> None:
    check(name, [of_logits(CASES[name])])


def of_all_logits() -> list[Found]:
    return [of_logits(case) for case in CASES.values()]


@pytest.mark.parametrize("world_size", [2, pytest.param(4, marks=pytest.mark.full)])
def test_loss_gradient_and_k_of_shards_equal_float64(ranks: RankPool, world_size: int) -> None:
    for name, *shards in zip(CASES, *ranks.run(of_all_logits, world_size=world_size), strict=True):
        check(name, shards)


def of_hidden_states(mode: str, shared: bool) -> list[tuple[str, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]]:
    """Return numbers of the fused layer and of float64; ``shared``: whether teacher and reference have one weight."""
    generator = torch.Generator().manual_seed(0)
    student, teacher, reference = (torch.randn(NUM_TOKENS, WIDTH, generator=generator) for _ in range(3))
    weights = [0.5 * torch.randn(PADDED_VOCAB_SIZE, WIDTH, generator=generator) for _ in range(3)]
    of_reference = weights[1] if shared else weights[2]
    (vocab, columns), tokens = shard(), rows()[3]
    size = PADDED_VOCAB_SIZE // vocab.size
    cut = slice(WIDTH // size * (columns.start // vocab.size), WIDTH // size * (columns.start // vocab.size + 1))
    found = []
    for name, case in CASES.items():
        if not shared and not case.target.is_anchored:
            continue
        hidden, weight = student.double().requires_grad_(), weights[0].double().requires_grad_()
        s, t, r = (
            states.double() @ matrix.double()[:VOCAB_SIZE].t()
            for states, matrix in ((hidden, weight), (teacher, weights[1]), (reference, of_reference))
        )
        expected, *_ = by_definition(case, s, t, r)
        total(expected, of_tokens(s), mode).backward()
        ours, own = student.clone().requires_grad_(), [it[columns].clone() for it in (*weights[:2], of_reference)]
        stats = fused_distillation_loss(
            ours,
            (mixed(case, teacher, reference) if shared else teacher)[:, cut],
            own[0].requires_grad_(),
            own[1],
            tokens,
            target=case.target,
            divergence=case.divergence,
            vocab=vocab,
            reference_entropy=entropy(r.log_softmax(-1)) if case.target.needs_reference_entropy else None,
            reference=None if shared else (reference[:, cut], own[2]),
            teacher_weights=WEIGHTS.float() if case.has_weights else None,
            chunk_tokens=4,
            mode=mode,
        )
        total(stats.loss, stats.student_log_prob, mode).backward()
        assert ours.grad is not None and own[0].grad is not None
        assert hidden.grad is not None and weight.grad is not None
        of_float64 = expected.detach(), hidden.grad, weight.grad[columns]
        found.append((name, stats.loss.detach(), ours.grad, own[0].grad, *of_float64))
    return found


@pytest.mark.parametrize(
    "world_size", [1, pytest.param(2, marks=pytest.mark.full), pytest.param(4, marks=pytest.mark.full)]
)
@pytest.mark.parametrize("shared", [True, False])
@pytest.mark.parametrize("mode", FUSED_MODES)
def test_the_loss_of_hidden_states_and_its_gradients_equal_float64(
    ranks: RankPool, mode: str, shared: bool, world_size: int
) -> None:
    for of_rank in ranks.run(of_hidden_states, mode, shared, world_size=world_size):
        for name, *values in of_rank:
            for ours, expected in zip(values[:3], values[3:], strict=True):
                error = {"rtol": 1e-3, "atol": 2e-5 * CASES[name].tolerance}
                torch.testing.assert_close(ours.double(), expected, **error, msg=lambda text, n=name: f"{n}: {text}")


def test_an_entropy_of_exactly_the_threshold_adds_nothing() -> None:
    """The target has two tied columns and nothing else, so that H(q) is exactly log 2."""
    student, teacher = torch.zeros(1, 8), torch.full((1, 8), -200.0)
    student[0, 1] = 1.0
    teacher[0, 2:7:4] = 0.0
    arguments = {"target": STUDENT_ALONE, "vocab": VocabShard(0, 8, 8)}
    tokens = torch.zeros(1, dtype=torch.int64)
    at, below = (
        distillation_loss(student, teacher, tokens, divergence=Divergence(forward_above=above), **arguments)
        for above in (math.log(2), math.log(2) - 1e-6)
    )
    assert at.target_entropy == torch.tensor(math.log(2)) and at.loss == at.reverse_kl
    assert below.loss > at.loss + 0.05
