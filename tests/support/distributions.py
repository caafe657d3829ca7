# Copyright (c) 2026 the megatron_selfdistill authors. Apache-2.0.
"""Classes of logits that are nasty for the solver of k, and the accuracy of the sharded loss on them."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from logit_pairs import entropy
from torch import Tensor

from megatron_selfdistill.loss import Divergence, Status, Target, VocabShard, distillation_loss, mixed_target

Pair = tuple[Tensor, Tensor]


@dataclass(frozen=True)
class Accuracy:
    """The accuracy of the tokens of one class, [T] float64; the errors are against float64.

    mismatch: |H(q) - H(p)| at the beta found, 0 where no match was wanted; normalisation: |sum of q - 1|; reverse_kl:
    the error of the reported KL(p || q).
    """

    beta: Tensor
    status: Tensor
    mismatch: Tensor
    normalisation: Tensor
    reverse_kl: Tensor


def measure(student: Tensor, teacher: Tensor, target: Target) -> Accuracy:
    """Return the accuracy of the loss on [T, V] logits, compared with float64."""
    num_tokens, vocab_size = student.shape
    vocab = VocabShard(0, vocab_size, vocab_size)
    tokens = torch.zeros(num_tokens, dtype=torch.int64)
    # The normaliser in use is read off one column: its log q, as reported, against the logits in float64.
    tokens += (student.double() + target.teacher_weight * teacher.double()).argmax(1)
    stats = distillation_loss(student, teacher, tokens, target=target, divergence=Divergence(), vocab=vocab)
    mix, beta = student.double() + target.teacher_weight * teacher.double(), stats.beta.double()
    log_p, log_q = student.double().log_softmax(-1), (beta[:, None] * mix).log_softmax(-1)
    mismatch = (entropy(log_q) - entropy(log_p)).abs()
    reference = mixed_target(student.double(), teacher.double(), target)
    asked = reference.status == Status.MATCHED
    used = stats.target_log_prob.double() - log_q.gather(1, tokens[:, None]).squeeze(1)
    kept = torch.isfinite(log_p) & torch.isfinite(log_q)
    reverse = torch.where(kept, log_p.exp() * (log_p - log_q), 0.0).sum(1)
    return Accuracy(
        beta=beta,
        status=stats.status,
        mismatch=torch.where(asked, mismatch, 0.0),
        normalisation=torch.expm1(used).abs(),
        reverse_kl=(stats.reverse_kl.double() - reverse).abs(),
    )


def draw(name: str, num_tokens: int, vocab_size: int, seed: int = 0) -> Pair:
    """Return the student's and the teacher's logits [num_tokens, vocab_size] of one class of DISTRIBUTIONS."""
    generator = torch.Generator().manual_seed(seed * 1000 + list(DISTRIBUTIONS).index(name))
    return DISTRIBUTIONS[name](num_tokens, vocab_size, generator)


def _normal(*size: Any) -> Tensor:
    *shape, generator = size
    return torch.randn(*shape, generator=generator)


def _llm(num_tokens: int, vocab_size: int, generator: torch.Generator) -> Tensor:
    """Return a broad bulk and a few tall columns, higher in some rows: entropies from 0.01 to several nats."""
    logits = 2.2 * _normal(num_tokens, vocab_size, generator)
    heads = torch.randint(vocab_size, (num_tokens, 12), generator=generator)
    height = 8 + 8 * torch.rand(num_tokens, 1, generator=generator)
    return logits.scatter(1, heads, height + 2 * torch.randn(num_tokens, 12, generator=generator))


def _noisy(student: Tensor, scale: float, generator: torch.Generator) -> Pair:
    """Return a student, and a teacher that differs from it by normal noise."""
    return student, student + scale * _normal(*student.shape, generator)


def _llm_pair(*size: Any) -> Pair:
    return _noisy(_llm(*size), 0.8, size[-1])


def _zipf(num_tokens: int, vocab_size: int, generator: torch.Generator) -> Pair:
    exponents = 0.8 + torch.rand(num_tokens, 1, generator=generator)
    return _noisy(-exponents * torch.arange(1, vocab_size + 1, dtype=torch.float32).log(), 0.5, generator)


def _one_hot(gap: float) -> Callable[[int, int, torch.Generator], Pair]:
    def pair(num_tokens: int, vocab_size: int, generator: torch.Generator) -> Pair:
        student = _normal(num_tokens, vocab_size, generator)
        rise = torch.zeros(vocab_size)
        rise[vocab_size // 3] = gap + torch.tensor(vocab_size / 4096).log()
        noise = 0.5 * _normal(num_tokens, vocab_size, generator)
        return student + rise, student + noise + rise

    return pair


def _peaked_student(*size: Any) -> Pair:
    return _llm(*size), 0.05 * _normal(*size)


def _swap(num_tokens: int, vocab_size: int, generator: torch.Generator) -> Pair:
    """Return a teacher that exchanges the student's two best columns."""
    student = _llm(num_tokens, vocab_size, generator)
    best = student.topk(2, dim=1)
    return student, student.scatter(1, best.indices, best.values.flip(1))


def _ties(num_tokens: int, vocab_size: int, generator: torch.Generator) -> Pair:
    """Return two columns tied at the top of the mix, where the student is surer than log 2: there is no root."""
    student, teacher = _one_hot(14.0)(num_tokens, vocab_size, generator)
    best = student.argmax(1, keepdim=True)
    other = (best + 1) % vocab_size
    student = student.scatter(1, best, 20.0).scatter(1, other, 14.0)
    return student, teacher.scatter(1, best, 12.0).scatter(1, other, 20.0)


def _near_ties(num_tokens: int, vocab_size: int, generator: torch.Generator) -> Pair:
    student, teacher = _ties(num_tokens, vocab_size, generator)
    best = teacher.argmax(1, keepdim=True)
    lift = 0.5 * torch.rand(num_tokens, 1, generator=generator)
    return student, teacher.scatter_add(1, best, lift)


def _masked(num_tokens: int, vocab_size: int, generator: torch.Generator) -> Pair:
    student, teacher = _llm_pair(num_tokens, vocab_size, generator)
    removed = torch.rand(vocab_size, generator=generator) < 0.5
    return student.masked_fill(removed, -torch.inf), teacher.masked_fill(removed, -torch.inf)


def _tied_tops(num_tied: int) -> Callable[[int, int, torch.Generator], Pair]:
    """Return equal best columns of both over a bulk of sigma 0, 0.5 and 2: H(beta) has a plateau at log(num_tied)."""

    def pair(num_tokens: int, vocab_size: int, generator: torch.Generator) -> Pair:
        sigma = torch.tensor([0.0, 0.5, 2.0]).repeat(num_tokens)[:num_tokens, None]
        student, teacher = (sigma * _normal(num_tokens, vocab_size, generator) for _ in "st")
        bulk = torch.tensor(vocab_size).log() + sigma**2 / 2
        student[:, :num_tied] = bulk - 2 + 14 * torch.rand(num_tokens, 1, generator=generator)
        teacher[:, :num_tied] = (bulk + 8) * torch.rand(num_tokens, 1, generator=generator)
        return student, teacher

    return pair


def _smallest_plateau(num_tokens: int, vocab_size: int, generator: torch.Generator) -> Pair:
    student, teacher = torch.zeros(num_tokens, vocab_size), torch.zeros(num_tokens, vocab_size)
    student[:, :2], teacher[:, :2] = 16.6, 7.0
    return student, teacher


def _forks(less_sure: float) -> Callable[[int, int, torch.Generator], Pair]:
    """Return two continuations over a small tail, .05 to .8 apart; the teacher is ``less_sure`` nats less sure."""

    def pair(num_tokens: int, vocab_size: int, generator: torch.Generator) -> Pair:
        student = 2.2 * _normal(num_tokens, vocab_size, generator)
        gap = torch.tensor([0.05, 0.1, 0.2, 0.8]).repeat(num_tokens)[:num_tokens, None]
        height = 13 + 7 * torch.rand(num_tokens, 1, generator=generator)
        student[:, :2] = height + gap * torch.randn(num_tokens, 2, generator=generator)
        teacher = student + 0.8 * _normal(num_tokens, vocab_size, generator)
        teacher[:, :2] = student[:, :2] - less_sure + gap * torch.randn(num_tokens, 2, generator=generator)
        return student.bfloat16(), teacher.bfloat16()

    return pair


def _levels(num_tokens: int, vocab_size: int, generator: torch.Generator) -> Pair:
    """Return columns of 0 except for one to three blocks of equal columns at random heights."""
    student, teacher = torch.zeros(num_tokens, vocab_size), torch.zeros(num_tokens, vocab_size)
    for row in range(num_tokens):
        start = 0
        for block in range(1 + row % 3):
            share = torch.rand(3, generator=generator)
            size = int(2 ** (6 * share[0])) if block else 1 + int(4 * share[0])
            student[row, start : start + size], teacher[row, start : start + size] = 20 * share[1], 18 * share[2] - 4
            start += size
    return student, teacher


DISTRIBUTIONS: dict[str, Callable[[int, int, torch.Generator], Pair]] = {
    "language model": _llm_pair,
    "language model, bf16": lambda *size: tuple(logits.bfloat16() for logits in _llm_pair(*size)),
    "large offsets": lambda *size: tuple(x + offset for x, offset in zip(_llm_pair(*size), (400, -300), strict=True)),
    "zipf": _zipf,
    "one-hot, H ~ 1e-1": _one_hot(11.0),
    "one-hot, H ~ 1e-4": _one_hot(20.0),
    "one-hot, H < 1e-6": _one_hot(30.0),
    "flat": lambda *size: (0.3 * _normal(*size), 0.5 * _normal(*size)),
    "peaked student, flat teacher": _peaked_student,
    "flat student, peaked teacher": lambda *size: _peaked_student(*size)[::-1],
    "disagree": lambda *size: (_llm(*size), _llm(*size)),
    "teacher swaps the top two": _swap,
    "ties": _ties,
    "near-ties": _near_ties,
    "masked": _masked,
    "teacher ~ student": lambda *size: _noisy(_llm(*size), 1e-3, size[-1]),
    "teacher sharper": lambda *size: ((student := _llm(*size)), 1.5 * student),
    "two tied tops": _tied_tops(2),
    "three tied tops": _tied_tops(3),
    "two tied tops, smallest": _smallest_plateau,
    "forks, bf16": _forks(0.0),
    "forks, teacher 4 nats less sure, bf16": _forks(4.0),
    "forks, teacher 6 nats less sure, bf16": _forks(6.0),
    "levels": _levels,
}
