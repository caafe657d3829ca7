# Copyright (c) 2026 the megatron_selfdistill authors. Apache-2.0.
"""What a target asks for equals float64 on full rows, for every target, dtype and number of shards."""

from __future__ import annotations

import math

import pytest
import torch
import torch.distributed as dist
from ranks import RankPool
from torch import Tensor

from megatron_selfdistill.loss import Divergence, Target, VocabShard, distillation_loss, mixed_target
from megatron_selfdistill.loss.sharded.target_measures import RARE, target_measures
from megatron_selfdistill.loss.sharded.vocab_parallel import vocab_entropy

VOCAB_SIZE, PADDED_VOCAB_SIZE, NUM_ROWS = 150, 192, 10  # over 4 ranks: 48, 48, 48 and 6 valid columns
TARGETS = {
    "mix with the student": Target(anchor="student"),
    "strict": Target(k_max=None, teacher_weight=2.0, anchor="student"),
    "given k": Target("fixed", k=1.3, anchor="student"),
    "teacher alone": Target("teacher_alone", anchor="student"),
    "reference": Target(anchor="reference", teacher_weight=2.0),
    "reference, the student's entropy": Target(anchor="reference", match="student"),
    "reference, geometric mean": Target("fixed", anchor="reference"),
}


def rows(dtype: torch.dtype) -> tuple[Tensor, Tensor, Tensor]:
    """Return logits of student, teacher and reference: flat, sharp and shifted rows, and an infinite column."""
    generator = torch.Generator().manual_seed(11)
    scale = torch.linspace(0.5, 5.0, NUM_ROWS)[:, None]
    reference = scale * torch.randn(NUM_ROWS, VOCAB_SIZE, generator=generator)
    teacher = reference + 2 * torch.randn(reference.shape, generator=generator)
    student = reference + torch.randn(reference.shape, generator=generator)
    student[0] = teacher[0] = reference[0] = 0.0  # every column has 1 / 150
    teacher[1, 149], student[1, 149], reference[1, 149] = 30.0, -4.0, -4.0  # a column of the last shard
    student[2] = teacher[2] = reference[2] = 20 * reference[2]
    student[3] -= 300.0
    for logits in (student, teacher, reference):
        logits[4, :60] = -torch.inf  # the whole first shard of four
    return student.to(dtype), teacher.to(dtype), reference.to(dtype)


def by_definition(target: Target, dtype: torch.dtype) -> Tensor:
    student, teacher, reference = (logits.double() for logits in rows(dtype))
    log_q = mixed_target(student, teacher, target, reference if target.is_anchored else None).log_q
    models = [student, reference] if target.is_anchored else [student]
    masses = [torch.where(logits.softmax(-1) < RARE, log_q.exp(), 0.0).sum(-1) for logits in models]
    return torch.stack([*masses, kl(log_q, models[-1]), kl(teacher.log_softmax(-1), models[-1])], 1)


def kl(log_p: Tensor, anchor: Tensor) -> Tensor:
    """Return KL(p || softmax(anchor)) of rows in which both are 0 in the same columns."""
    terms = log_p.exp() * (log_p - anchor.log_softmax(-1))
    return torch.where(torch.isneginf(log_p), 0.0, terms).sum(-1)


def measured(name: str, dtype: torch.dtype) -> Tensor:
    """Return masses and divergences from this rank's shards, with the loss's beta and garbage in the padding."""
    target = TARGETS[name]
    group = dist.group.WORLD if dist.is_initialized() and dist.get_world_size() > 1 else None
    vocab = VocabShard.from_group(PADDED_VOCAB_SIZE, VOCAB_SIZE, group)
    student, teacher, reference = rows(dtype)
    w = target.teacher_weight
    mix = (w * teacher + reference) / (1 + w) if target.is_anchored else teacher
    padding = torch.full((NUM_ROWS, PADDED_VOCAB_SIZE - VOCAB_SIZE), 77.0, dtype=dtype)
    columns = slice(vocab.start, vocab.start + vocab.size)
    s, m, r, t = (torch.cat([one, padding], 1)[:, columns].clone() for one in (student, mix, reference, teacher))
    wanted = vocab_entropy(r, vocab) if target.needs_reference_entropy else None
    tokens = torch.zeros(NUM_ROWS, dtype=torch.int64)
    stats = distillation_loss(
        s, m, tokens, target=target, divergence=Divergence(), vocab=vocab, reference_entropy=wanted
    )
    reference_logits = r if target.is_anchored else None
    masses, divergences, _ = target_measures(
        s, m, stats.beta, target=target, vocab=vocab, reference_logits=reference_logits, own_teacher_logits=t
    )
    assert divergences is not None
    return torch.cat([masses, divergences], 1)


def check(found: Tensor, target: Target, dtype: torch.dtype) -> None:
    expected = by_definition(target, dtype)
    assert expected[0, 0] == 0 and (expected[5:, 0] > 1e-4).all()
    if target.teacher_weight == 2 or target.rule == "teacher_alone":
        assert expected[1, 0] > 0.3
    tolerance = 1e-4 if dtype == torch.float32 else 1e-5  # beta is accurate to 1e-5 nats of entropy
    torch.testing.assert_close(found[:, :-2], expected[:, :-2], rtol=0, atol=tolerance)
    # A divergence is a sum over columns of q (log q - log a); beta moves log q by a relative 1e-5.
    torch.testing.assert_close(found[:, -2:], expected[:, -2:], rtol=10 * tolerance, atol=tolerance)
    assert (expected[5:, -2:] > 0.02).all() and (expected[[0, 2], -1:].abs() < 1e-12).sum() >= 1
    if target.rule == "teacher_alone":
        assert torch.equal(found[:, -2], found[:, -1])


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
@pytest.mark.parametrize("name", TARGETS)
def test_one_shard_equals_the_definition(name: str, dtype: torch.dtype) -> None:
    check(measured(name, dtype), TARGETS[name], dtype)


def each_target() -> list[Tensor]:
    return [measured(name, torch.float32) for name in TARGETS]


@pytest.mark.parametrize("world_size", [2, pytest.param(4, marks=pytest.mark.full)])
def test_shards_equal_the_definition_with_the_same_bits_on_every_rank(ranks: RankPool, world_size: int) -> None:
    per_rank = ranks.run(each_target, world_size=world_size)
    for target, *found in zip(TARGETS.values(), *per_rank, strict=True):
        assert all(torch.equal(mass, found[0]) for mass in found)
        check(found[0], target, torch.float32)


def test_tokens_may_have_their_own_teacher_weights() -> None:
    student, teacher, reference = rows(torch.float64)
    weights, target = torch.linspace(0.1, 4.0, NUM_ROWS).double(), TARGETS["reference, geometric mean"]
    vocab = VocabShard(0, VOCAB_SIZE, VOCAB_SIZE)
    mix = (weights[:, None] * teacher + reference) / (1 + weights[:, None])
    found, divergences, _ = target_measures(
        student,
        mix,
        1 / (1 + weights),
        target=target,
        vocab=vocab,
        reference_logits=reference,
        own_teacher_logits=teacher,
        teacher_weights=weights,
    )
    assert divergences is not None
    for row, weight in enumerate(weights.tolist()):
        log_q = mixed_target(student[row], teacher[row], target.with_teacher_weight(weight), reference[row]).log_q
        expected = [
            torch.where(logits[row].softmax(-1) < RARE, log_q.exp(), 0.0).sum() for logits in (student, reference)
        ]
        torch.testing.assert_close(found[row], torch.stack(expected), rtol=0, atol=1e-9)
        both = [kl(log_p, reference[row]) for log_p in (log_q, teacher[row].log_softmax(-1))]
        torch.testing.assert_close(divergences[row], torch.stack(both), rtol=1e-9, atol=1e-9)


def test_a_token_with_nan_gives_nan_and_no_other_token_changes() -> None:
    student, teacher, reference = rows(torch.float64)
    target, vocab = TARGETS["reference, geometric mean"], VocabShard(0, VOCAB_SIZE, VOCAB_SIZE)
    beta = torch.full((NUM_ROWS,), 1 / target.geometric_k, dtype=torch.float64)

    def masses() -> Tensor:
        found = target_measures(student, teacher, beta, target=target, vocab=vocab, reference_logits=reference)
        assert found.kl_to_anchor is None, "nobody gave the teacher's own logits"
        return found.mass_on_rare

    before = masses()
    student[2, 3] = math.nan
    reference[6, 0] = torch.inf
    beta[7] = math.nan
    after = masses()
    broken = torch.tensor([2, 6, 7])
    assert after[broken].isnan().all()
    kept = torch.ones(NUM_ROWS, dtype=torch.bool).index_fill_(0, broken, False)
    assert torch.equal(after[kept], before[kept])


def test_no_tokens_have_no_mass_and_what_does_not_fit_is_refused() -> None:
    vocab, none = VocabShard(0, 150, 150), torch.zeros(0, 150)
    found = target_measures(
        none, none, none[:, 0], target=Target(anchor="student"), vocab=vocab, own_teacher_logits=none
    )
    assert found.mass_on_rare.shape == (0, 1) and found.kl_to_anchor is not None and found.kl_to_anchor.shape == (0, 2)
    with pytest.raises(ValueError, match=r"beta must be \[0\].*got \[2\]"):
        target_measures(none, none, torch.ones(2), target=Target(anchor="student"), vocab=vocab)
