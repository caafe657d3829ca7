# Copyright (c) 2026 the megatron_selfdistill authors. Apache-2.0.
"""The target that mixes the teacher with a frozen reference: closed forms, and k by bisection in float64."""

from __future__ import annotations

import math

import pytest
import torch
from logit_pairs import entropy, pair
from torch import Tensor

from megatron_selfdistill.loss import Divergence, Status, Target, VocabShard, distillation_loss, mixed_target
from megatron_selfdistill.loss.sharded.fused_linear import fused_distillation_loss
from megatron_selfdistill.loss.sharded.vocab_parallel import vocab_entropy

VOCAB_SIZE, PADDED_VOCAB_SIZE = 150, 192  # over 4 ranks: 48, 48, 48 and 6 valid columns
W = 0.75
TARGETS = {
    "reference's entropy": Target(anchor="reference"),
    "reference's entropy, strict": Target(anchor="reference", k_max=None),
    "student's entropy": Target(anchor="reference", match="student", teacher_weight=2.0),
    "student's entropy, strict": Target(anchor="reference", match="student", k_max=None),
    "geometric mean": Target("fixed", anchor="reference"),
    "k 1.3": Target("fixed", k=1.3, anchor="reference"),
    "batch": Target("batch", k=1.9, k_max=None, anchor="reference"),
}


def rows(dtype: torch.dtype = torch.float32) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Return logits [12, VOCAB_SIZE] of student, teacher and reference, and response tokens.

    Among the rows are sharp, flat and tied ones, equal models, and a student that has drifted far from the reference.
    """
    generator = torch.Generator().manual_seed(3)
    reference = torch.linspace(0.3, 5.0, 12)[:, None] * torch.randn(12, VOCAB_SIZE, generator=generator)
    teacher = reference + torch.randn(reference.shape, generator=generator)
    student = reference + 0.5 * torch.randn(reference.shape, generator=generator)
    student[0] = teacher[0] = reference[0]
    student[1] = 3 * torch.randn(VOCAB_SIZE, generator=generator)
    teacher[2] = 40 * reference[2]
    reference[3, :2] = teacher[3, 5:7] = 20.0  # two forks, with other columns
    reference[4] = teacher[4] = 0.0
    student[5] += 1e4
    tokens = torch.randint(VOCAB_SIZE, (12,), generator=generator)
    return student.to(dtype), teacher.to(dtype), reference.to(dtype), tokens


def beta_by_bisection(student: Tensor, teacher: Tensor, reference: Tensor, target: Target) -> Tensor:
    """Return the beta of float64 rows, written out."""
    w = target.teacher_weight
    if target.rule != "entropy_matched":
        return torch.full((len(student),), 1 / (target.k or 1 + w), dtype=torch.float64)
    wanted = entropy((student if target.match == "student" else reference).log_softmax(-1)).clamp(min=1e-6)
    low = torch.full_like(wanted, 1 / 16 / (1 + w)).log()
    high = low + math.log(256)
    for _ in range(80):
        middle = (low + high) / 2
        soft = entropy((middle.exp()[:, None] * (w * teacher + reference)).log_softmax(-1)) > wanted
        low, high = torch.where(soft, middle, low), torch.where(soft, high, middle)
    return low.exp().clamp(min=0.0 if target.k_max is None else 1 / (1 + w))


def test_the_match_on_a_two_way_fork_keeps_the_reference_or_returns_its_mirror_image() -> None:
    """Flips where w > w* = logit(r) / logit(t), in absolute value."""
    r, t = math.log(0.1 / 0.9), math.log(0.7 / 0.3)
    flip = abs(r / t)
    reference, teacher = (torch.tensor([[value, 0.0]], dtype=torch.float64) for value in (r, t))
    for weight, expected in ((0.5 * flip, 0.1), (1.6 * flip, 0.9)):
        target = Target(teacher_weight=weight, k_max=None, anchor="reference")
        q = mixed_target(torch.zeros(1, 2).double(), teacher, target, reference).log_q.exp()
        assert q[0, 0].item() == pytest.approx(expected, abs=1e-9)


def test_with_the_geometric_k_reverse_kl_is_distillation_with_a_penalty_to_the_reference() -> None:
    """(1 + w) KL(p || q) = w KL(p || t) + KL(p || r) + const, so the gradients are equal."""
    (s, t), (r, _) = pair(1), pair(2)
    s.requires_grad_()
    log_p, log_t, log_r = s.log_softmax(-1), t.log_softmax(-1), r.log_softmax(-1)
    log_q = mixed_target(s.detach(), t, Target("fixed", anchor="reference"), r).log_q
    ours = (1 + W) * (log_p.exp() * (log_p - log_q)).sum()
    theirs = (log_p.exp() * (W * (log_p - log_t) + (log_p - log_r))).sum()
    for a, b in zip(torch.autograd.grad(ours, s, retain_graph=True), torch.autograd.grad(theirs, s), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-10, atol=1e-14)


@pytest.mark.parametrize("weight", [0.25, 0.75, 1.0, 2.0, 8.0])
def test_with_the_geometric_k_the_target_is_that_of_beta_opsd(weight: float) -> None:
    """beta-OPSD (arXiv 2607.28582): q ~ teacher^(1 / beta) reference^(1 - 1 / beta); beta = (1 + w) / w."""
    (s, t), (r, _) = pair(1), pair(2)
    beta = (1 + weight) / weight
    interpolated = t.softmax(-1) ** (1 / beta) * r.softmax(-1) ** (1 - 1 / beta)
    expected = (interpolated / interpolated.sum(-1, keepdim=True)).log()
    for k in (None, 1 + weight):
        found = mixed_target(s, t, Target("fixed", teacher_weight=weight, k=k, anchor="reference"), r)
        torch.testing.assert_close(found.log_q, expected, rtol=1e-12, atol=1e-12)


def test_the_target_stands_still_while_the_student_moves_and_does_not_where_it_matches_the_student() -> None:
    (s, t), (r, _) = pair(3), pair(4)
    for target, stands in ((Target(anchor="reference"), True), (Target(anchor="reference", match="student"), False)):
        first, second = (mixed_target(student, t, target, r).log_q for student in (s, 0.2 * s))
        assert torch.equal(first, second) == stands


def test_equal_models_give_the_reference_itself_at_the_geometric_k() -> None:
    s, _ = pair(5)
    for target in (TARGETS["reference's entropy"], TARGETS["student's entropy, strict"], TARGETS["geometric mean"]):
        found = mixed_target(s, s, target, s)
        torch.testing.assert_close(found.log_q, s.log_softmax(-1), rtol=0, atol=1e-12)
        stats = distillation_loss(
            s.float(),
            s.float(),
            torch.zeros(16, dtype=torch.int64),
            target=target,
            divergence=Divergence(),
            vocab=VocabShard(0, 200, 200),
            reference_entropy=entropy(s.float().log_softmax(-1)) if target.needs_reference_entropy else None,
        )
        assert stats.loss.max() < 1e-6
        torch.testing.assert_close(stats.beta, torch.full((16,), 1 / target.geometric_k), rtol=1e-6, atol=0)


@pytest.mark.parametrize("name", TARGETS)
def test_the_definition_equals_float64_written_out(name: str) -> None:
    student, teacher, reference, _ = rows(torch.float64)
    target = TARGETS[name]
    beta = beta_by_bisection(student, teacher, reference, target)
    found = mixed_target(student, teacher, target, reference)
    known = found.status != Status.UNDETERMINED
    torch.testing.assert_close(found.beta[known], beta[known], rtol=1e-6, atol=0)


def test_a_reference_of_another_shape_or_without_its_target_is_refused() -> None:
    student, weight = torch.randn(3, 16), torch.randn(PADDED_VOCAB_SIZE, 16)
    vocab = VocabShard(0, PADDED_VOCAB_SIZE, VOCAB_SIZE)
    arguments = (student, student, weight, None, torch.zeros(3, dtype=torch.int64))
    options = {"divergence": Divergence(), "vocab": vocab}
    anchored = Target("fixed", anchor="reference")
    for target, reference, words in (
        (Target(anchor="student"), (student, weight), "and None where the anchor has none"),
        (anchored, (student[:2], weight), r"reference_hidden must be \[3, r\].*got \[2, 16\]"),
        (anchored, (student, weight[:5]), r"reference_weight must be \[192, 16\].*got \[5, 16\]"),
    ):
        with pytest.raises(ValueError, match=words):
            fused_distillation_loss(*arguments, target=target, reference=reference, **options)


def test_the_entropy_of_a_vocabulary_is_that_of_its_valid_columns() -> None:
    logits = torch.cat([rows()[0], torch.full((12, 42), 99.0)], 1)
    found = vocab_entropy(logits, VocabShard(0, PADDED_VOCAB_SIZE, VOCAB_SIZE))
    torch.testing.assert_close(found, entropy(rows()[0].double().log_softmax(-1)), rtol=1e-5, atol=1e-5)
    with pytest.raises(ValueError, match=r"logits must be \[12, 150\].*got \[12, 192\]"):
        vocab_entropy(logits, VocabShard(0, 150, 150))


def test_a_reference_is_given_if_and_only_if_the_target_has_one() -> None:
    s, t = pair(0)
    for target, more in ((Target(anchor="reference"), ()), (Target(anchor="student"), (s,))):
        with pytest.raises(ValueError, match="reference_logits must be given where the anchor has a reference"):
            mixed_target(s, t, target, *more)
