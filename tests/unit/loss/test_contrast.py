# Copyright (c) 2026 the megatron_selfdistill authors. Apache-2.0.
"""Controls and shared anchors: the definition, the sharded loss and the fused layer equal float64 written out here."""

from __future__ import annotations

import dataclasses
import math
from typing import Any

import pytest
import torch
import torch.distributed as dist
from called_collectives import GATHER, called_collectives
from logit_pairs import by_bisection
from tiers import combinations
from torch import Tensor

from megatron_selfdistill.loss import Divergence, Target, VocabShard
from megatron_selfdistill.loss.definition import mixed_target
from megatron_selfdistill.loss.functional import linear_self_distillation_loss, self_distillation_loss
from megatron_selfdistill.loss.sharded.contrast import contrast, row_log_sums
from megatron_selfdistill.loss.sharded.fused_linear import fused_distillation_loss
from megatron_selfdistill.loss.sharded.subtracted_controls import log_normalisers, subtract_controls
from megatron_selfdistill.loss.sharded.vocab_parallel import chosen, vocab_entropy

VOCAB_SIZE, PADDED_VOCAB_SIZE = 140, 192  # over 4 ranks: 48, 48, 44 and no valid columns
WIDTH, K = 16, 3
TORCH = chosen("torch", torch.zeros(1, 1), torch.zeros(1, 1))
TARGETS = {
    "student": Target(anchor="student", num_controls=K),
    "student, strong": Target(anchor="student", teacher_weight=4.0, num_controls=K),
    "student, any k": Target(anchor="student", k_max=None, num_controls=K),
    "student, fixed": Target("fixed", anchor="student", num_controls=K),
    "reference": Target(num_controls=K),
    "reference, student's entropy": Target(match="student", num_controls=K),
    "a share of the reference": Target(anchor=0.2, num_controls=K),
    "a share, student's entropy": Target(anchor=0.9, match="student", num_controls=K),
    "a share, fixed": Target("fixed", anchor=0.5, num_controls=K),
    "a share without controls": Target(anchor=0.3),
}


def rows() -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Return float64 logits of student, teacher and reference [9, VOCAB_SIZE], and of the controls [K, 9, VOCAB_SIZE].

    The rows are: equal models, controls that equal the teacher, ties, two forks, huge logits, a control far above the
    others, a teacher that excludes columns, columns that do not exist, and an ordinary row.
    """
    generator = torch.Generator().manual_seed(5)

    def normal(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator, dtype=torch.float64)

    reference = 2 * normal(9, VOCAB_SIZE)
    teacher, student = reference + normal(9, VOCAB_SIZE), reference + 0.5 * normal(9, VOCAB_SIZE)
    controls = reference + normal(K, 9, VOCAB_SIZE)
    controls[:, 0] = teacher[0] = student[0] = reference[0]
    controls[:, 1] = teacher[1] + torch.tensor([[0.0], [50.0], [-3.0]], dtype=torch.float64)
    for logits in (teacher, student, reference, controls):
        logits[..., 2, :] = 0.0
        logits[..., 7, 40:60] = -torch.inf
    teacher[2, :2] = 3.0
    reference[3, :2] = student[3, :2] = teacher[3, 5:7] = 20.0
    student[4], teacher[4], controls[:, 4] = student[4] + 1e4, teacher[4] - 1e4, 50 * controls[:, 4]
    controls[1, 5, 3] = 200.0
    teacher[6, 10:12] = -torch.inf
    return student, teacher, reference, controls


def log_q_by_definition(
    student: Tensor, teacher: Tensor, reference: Tensor, controls: Tensor, target: Target
) -> Tensor:
    """Return log q, written out: m = w (t - c) + a, and k <= 1 (without controls 1 + w) with H(q) = H(a or student)."""
    return by_bisection(student, teacher, target, reference, controls if target.num_controls else None)[0]


def reverse_kl(student: Tensor, log_q: Tensor) -> tuple[Tensor, Tensor]:
    """Return KL(p || q) and its gradient to the student's logits, p (log p - log q - KL)."""
    log_p = student.log_softmax(-1)
    ratio = torch.where(torch.isneginf(log_p), 0.0, log_p - log_q)
    value = (log_p.exp() * ratio).sum(-1)
    return value, log_p.exp() * (ratio - value[:, None])


EXCLUDED = 6
"""The row whose reverse KL is infinite, since the teacher excludes columns that the student has."""
ORDINARY = [row for row in range(9) if row != EXCLUDED]


@pytest.mark.parametrize("target", TARGETS.values(), ids=TARGETS)
def test_the_definition_is_the_formula(target: Target) -> None:
    student, teacher, reference, controls = rows()
    anchor = reference if target.has_reference else None
    found = mixed_target(student, teacher, target, anchor, controls if target.num_controls else None).log_q
    expected = log_q_by_definition(student, teacher, reference, controls, target)
    torch.testing.assert_close(found.exp(), expected.exp(), rtol=0, atol=1e-9)
    assert (found[EXCLUDED, 10:12] == -torch.inf).all()


@pytest.mark.parametrize("target", TARGETS.values(), ids=TARGETS)
def test_loss_and_gradient_are_those_of_the_formula(target: Target) -> None:
    """The bound is the rounding of float32 logits, times the weight and the inverse temperature that multiply it."""
    student, teacher, reference, controls = (it[..., ORDINARY, :] for it in rows())
    expected, gradient = reverse_kl(student, log_q_by_definition(student, teacher, reference, controls, target))
    for dtype, tolerance in ((torch.float64, 1e-5), (torch.float32, 5e-3)):
        logits = student.to(dtype).requires_grad_()
        found = self_distillation_loss(
            logits,
            teacher.to(dtype),
            reference.to(dtype) if target.has_reference else None,
            control_logits=controls.to(dtype) if target.num_controls else None,
            target=target,
            reduction="none",
        )
        chosen = [row for row in range(len(ORDINARY)) if row != 4 or dtype == torch.float64]  # 1e4 has no digits left
        torch.testing.assert_close(found[chosen].double(), expected[chosen], rtol=tolerance, atol=tolerance)
        (got,) = torch.autograd.grad(found[chosen].sum(), logits)
        torch.testing.assert_close(got[chosen].double(), gradient[chosen], rtol=tolerance, atol=tolerance)


def test_where_all_hints_are_alike_the_student_is_its_own_target() -> None:
    """The identity law: t = c gives q = p and loss 0, for every weight and every number of controls."""
    student, teacher = (it[ORDINARY] for it in rows()[:2])
    for num_controls in (1, 2, 5):
        for weight in (0.5, 0.75, 4.0):
            target = Target(anchor="student", teacher_weight=weight, num_controls=num_controls)
            controls = teacher.expand(num_controls, -1, -1)
            found = mixed_target(student, teacher, target, control_logits=controls)
            torch.testing.assert_close(found.log_q.exp(), student.softmax(-1), rtol=0, atol=1e-7)
            loss = self_distillation_loss(student, teacher, control_logits=controls, target=target, reduction="none")
            assert loss.abs().max() < 1e-9


@pytest.mark.parametrize("mode", ["keep_gradient", "low_memory", "logits"])
@pytest.mark.parametrize("anchor", ["reference", 0.1])
def test_equal_models_in_bf16_have_no_loss_where_their_logits_are_far_from_normalised(anchor: Any, mode: str) -> None:
    """The identity law with normalisers of 15 to 25 nats, beside which bf16 would lose all digits of t - c."""
    generator = torch.Generator().manual_seed(3)
    hidden, weight = (torch.randn(n, 64, generator=generator).bfloat16() for n in (40, 1000))
    logits, vocab, target = hidden @ weight.T, VocabShard(0, 1000, 1000), Target(anchor=anchor, num_controls=2)
    assert logits.float().logsumexp(-1).mean() > 15
    tokens, entropy = (
        torch.zeros(40, dtype=torch.int64),
        vocab_entropy(logits, vocab) if anchor == "reference" else None,
    )
    if mode == "logits":
        contrast_of, normalisers = logits.clone(), torch.empty(2, 40)
        options = {"vocab": vocab, "backend": TORCH, "chunk_tokens": 32}
        subtract_controls(contrast_of, lambda rows: logits[rows].expand(2, -1, -1), normalisers, **options)
        assert contrast_of.abs().max() < 1e-5
        return
    states = {"reference": (hidden, weight), "control_hidden": hidden.expand(2, -1, -1), "reference_entropy": entropy}
    options = {"target": target, "divergence": Divergence(), "vocab": vocab, "chunk_tokens": 16, "mode": mode}
    found = fused_distillation_loss(hidden, hidden, weight, weight, tokens, **states, **options)
    assert found.loss.abs().max() < 5e-5, "a tenth of the reference is rounded to bf16, too"


@dataclasses.dataclass
class Layer:
    student: Tensor
    teacher: Tensor
    reference: Tensor
    controls: Tensor
    student_weight: Tensor
    teacher_weight: Tensor

    @classmethod
    def made(cls, num_tokens: int) -> Layer:
        generator = torch.Generator().manual_seed(8)

        def normal(*shape: int) -> Tensor:
            return torch.randn(*shape, generator=generator, dtype=torch.float64) / 2

        hidden = normal(num_tokens, WIDTH)
        return cls(
            hidden,
            hidden + normal(num_tokens, WIDTH),
            hidden + 0.3 * normal(num_tokens, WIDTH),
            hidden + normal(K, num_tokens, WIDTH),
            normal(PADDED_VOCAB_SIZE, WIDTH),
            normal(PADDED_VOCAB_SIZE, WIDTH),
        )

    def logits(self) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        own, other = (weight[:VOCAB_SIZE].T for weight in (self.student_weight, self.teacher_weight))
        return self.student @ own, self.teacher @ other, self.reference @ other, self.controls @ other

    def fused(self, target: Target, mode: str, chunk_tokens: int, vocab: VocabShard) -> tuple[Tensor, Tensor, Tensor]:
        columns = slice(vocab.start, vocab.start + vocab.size)
        hidden, weight = self.student.clone().requires_grad_(), self.student_weight[columns].clone().requires_grad_()
        theirs, entropy = self.teacher_weight[columns], None
        if target.needs_reference_entropy and target.is_anchored:
            log_r = self.logits()[2].log_softmax(-1)
            entropy = -(log_r.exp() * log_r).sum(-1)
        stats = fused_distillation_loss(
            hidden,
            self.teacher,
            weight,
            theirs,
            torch.zeros(len(hidden), dtype=torch.int64),
            target=target,
            divergence=Divergence(),
            vocab=vocab,
            reference_entropy=entropy,
            reference=(self.reference, theirs) if target.has_reference else None,
            control_hidden=self.controls if target.num_controls else None,
            chunk_tokens=chunk_tokens,
            mode=mode,
        )
        of_hidden, of_weight = torch.autograd.grad(stats.loss.sum(), (hidden, weight))
        return stats.loss.detach(), of_hidden, of_weight


@combinations(
    name=[name for name in TARGETS if "fixed" not in name and "k" not in name.split()],
    mode=["keep_gradient", "low_memory"],
    chunk_tokens=[1, 4, 100],
    strength=1,
)
def test_the_fused_layer_equals_the_formula_in_every_chunking(name: str, mode: str, chunk_tokens: int) -> None:
    layer, target = Layer.made(13), TARGETS[name]
    loss, of_hidden, of_weight = layer.fused(target, mode, chunk_tokens, VocabShard(0, PADDED_VOCAB_SIZE, VOCAB_SIZE))
    student, *others = layer.logits()
    expected, gradient = reverse_kl(student, log_q_by_definition(student, *others, target))
    torch.testing.assert_close(loss, expected, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(of_hidden, gradient @ layer.student_weight[:VOCAB_SIZE], rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(of_weight[:VOCAB_SIZE], gradient.T @ layer.student, rtol=1e-4, atol=1e-5)
    assert (of_weight[VOCAB_SIZE:] == 0).all()


def test_the_linear_loss_takes_the_states_of_controls() -> None:
    layer, target = Layer.made(6), TARGETS["student"]
    expected = self_distillation_loss(*layer.logits()[:2], control_logits=layer.logits()[3], target=target)
    found = linear_self_distillation_loss(
        layer.student,
        layer.student_weight[:VOCAB_SIZE],
        layer.teacher,
        layer.teacher_weight[:VOCAB_SIZE],
        control_hidden=layer.controls,
        target=target,
        chunk_tokens=4,
    )
    torch.testing.assert_close(found, expected, rtol=1e-6, atol=1e-8)


FUSED = [("student", "low_memory"), ("reference", "keep_gradient"), ("a share of the reference", "low_memory")]


def on_a_rank() -> list[tuple[Any, ...]]:
    vocab = VocabShard.from_group(PADDED_VOCAB_SIZE, VOCAB_SIZE, dist.group.WORLD)
    layer, found = Layer.made(9), []
    _, teacher, _, controls = (
        torch.nn.functional.pad(it, (0, PADDED_VOCAB_SIZE - VOCAB_SIZE), value=9.0).split(vocab.size, -1)[
            dist.get_rank()
        ]
        for it in layer.logits()
    )
    for name, mode in FUSED:
        with called_collectives() as called:
            fused = layer.fused(TARGETS[name], mode, 4, vocab)
        normalisers = log_normalisers(controls, vocab, TORCH)
        difference = contrast(teacher, controls, normalisers)[:, : vocab.num_valid]
        found.append((*fused, normalisers, difference, vocab.start, called))
    return found


@pytest.mark.parametrize("world_size", [4, pytest.param(2, marks=pytest.mark.full)])
def test_every_split_of_the_vocabulary_equals_one_rank(ranks: Any, world_size: int) -> None:
    layer = Layer.made(9)
    _, teacher, _, controls = layer.logits()
    whole = contrast(teacher, controls, row_log_sums(controls, VOCAB_SIZE))
    for (name, mode), *results in zip(FUSED, *ranks.run(on_a_rank, world_size=world_size), strict=True):
        target = TARGETS[name]
        loss, of_hidden, of_weight = layer.fused(target, mode, 4, VocabShard(0, PADDED_VOCAB_SIZE, VOCAB_SIZE))
        of_anchor = 3 if target.reference_share else 0  # the entropy of the mixed anchor, once per chunk
        for own_loss, own_hidden, own_weight, normalisers, difference, start, called in results:
            # Three chunks of at most 4 tokens; their normalisers for at most 2 = ceil(4 / K) tokens at a time.
            assert called == [GATHER] * (3 * 3 + 5 + of_anchor) + ["all_reduce"]
            torch.testing.assert_close(own_loss, loss, rtol=1e-9, atol=1e-9)
            torch.testing.assert_close(own_hidden, of_hidden, rtol=1e-7, atol=1e-9)
            torch.testing.assert_close(own_weight, of_weight[start : start + len(own_weight)], rtol=1e-7, atol=1e-9)
            torch.testing.assert_close(normalisers, controls.logsumexp(-1), rtol=1e-12, atol=1e-12)
            of_whole = whole[:, start : start + difference.size(1)]
            torch.testing.assert_close(difference, of_whole, rtol=1e-12, atol=1e-12)


def test_what_every_hint_does_alike_cancels_and_what_this_hint_says_remains() -> None:
    """A shift of teacher and controls by one vector changes nothing; a shift of the teacher alone raises its column."""
    student, teacher, _, controls = (it[..., -1:, :] for it in rows())
    target, habit = TARGETS["student"], torch.randn(VOCAB_SIZE, dtype=torch.float64)
    before = mixed_target(student, teacher, target, control_logits=controls.log_softmax(-1)).log_q
    # A factor of every probability, which each control shares: the controls stay normalised relative to each other.
    shifted = controls.log_softmax(-1) + habit
    mean = (shifted.logsumexp(0) - math.log(K))[None].expand(K, -1, -1)
    after = mixed_target(student, teacher + habit, target, control_logits=mean).log_q
    torch.testing.assert_close(after, before, rtol=0, atol=1e-9)
    news = teacher.clone()
    news[0, 7] += 3.0
    raised = mixed_target(student, news, target, control_logits=controls).log_q
    assert raised[0, 7] > before[0, 7] + 1.0
