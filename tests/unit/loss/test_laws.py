# Copyright (c) 2026 the megatron_selfdistill authors. Apache-2.0.
"""Laws of the sharded loss on every backend: identity, invariances, bad values, columns of -inf, extreme rows."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from kernel_cases import BACKEND, DEVICE, every_backend, on_cpu
from logit_pairs import divergence
from tiers import combinations
from torch import Tensor

from megatron_selfdistill.loss import Divergence, Status, Target, TokenStats, VocabShard, distillation_loss

TARGETS = [
    Target(anchor="student"),
    Target(k_max=None, anchor="student"),
    Target("fixed", k=1.5, anchor="student"),
    Target("batch", anchor="student"),
    Target("teacher_alone", anchor="student"),
]
DIVERGENCES = [Divergence("reverse_kl"), Divergence("forward_kl"), Divergence("jsd", 0.5)]
RENYI = [Divergence(order=2.0), Divergence("forward_kl", order=0.5)]
every_target = pytest.mark.parametrize("target", TARGETS, ids=lambda t: f"{t.rule}-{t.k_max}")
every_divergence = pytest.mark.parametrize("kind", DIVERGENCES, ids=lambda d: d.kind)


def pair(seed: int, scale: float = 3.0, num_rows: int = 8, vocab_size: int = 257) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    student, other = (scale * torch.randn(num_rows, vocab_size, generator=generator) for _ in range(2))
    return student, 0.5 * student + 0.7 * other


def run(student: Tensor, teacher: Tensor, target: Target, kind: Divergence) -> tuple[TokenStats, Tensor]:
    leaf = student.to(DEVICE, copy=True).requires_grad_()
    options = {"vocab": VocabShard(0, student.shape[1], student.shape[1]), "backend": BACKEND}
    tokens = torch.zeros(student.shape[0], dtype=torch.int64, device=DEVICE)
    stats = distillation_loss(leaf, teacher.to(DEVICE), tokens, target=target, divergence=kind, **options)
    stats.loss.sum().backward()
    assert leaf.grad is not None
    return on_cpu(stats), leaf.grad.cpu()


@every_backend(cases=3)
@combinations(
    kind={it.kind: it for it in DIVERGENCES},
    target={
        "capped": Target(anchor="student"),
        "unbounded": Target(k_max=None, anchor="student"),
        "wide": Target(k_max=3.0, anchor="student"),
        "fixed": Target("fixed", anchor="student"),
    },
    dtype=[torch.float32, torch.bfloat16],
)
def test_equal_logits_are_the_identity(kind: Divergence, target: Target, dtype: torch.dtype) -> None:
    for scale in (0.0, 1e-3, 0.5, 3.0, 30.0):
        student, _ = pair(0, scale)
        student[:, 5] += torch.linspace(0, 40, 8)
        stats, gradient = run(student.to(dtype), student.to(dtype), target, kind)
        determined = stats.status != Status.UNDETERMINED
        assert (stats.beta * 1.75 - 1)[determined].abs().amax() <= 1e-6 if determined.any() else True
        assert (stats.status[determined] <= Status.MATCHED).all() or target.rule == "fixed"
        bound = 4 * 2.0**-24 * math.log(257)  # four roundings of the normalisers' logarithms
        assert stats.loss.abs().max() <= bound and gradient.abs().max() <= bound
        assert stats.reverse_kl.abs().max() <= bound


@every_target
@every_divergence
@settings(max_examples=10, deadline=None)
@given(seed=st.integers(0, 10**6), scale=st.floats(0.01, 12.0))
def test_the_gradient_sums_to_zero_and_the_loss_is_not_negative(
    target: Target, kind: Divergence, seed: int, scale: float
) -> None:
    stats, gradient = run(*pair(seed, scale), target, kind)
    # A probability has the relative error of its logit, of up to 4 times the scale, and of a few sums and products.
    bound = 2.0**-24 * (32 + 8 * scale)
    assert gradient.sum(1).abs().max() <= bound * max(1.0, gradient.abs().sum(1).max())
    assert (stats.loss >= 0).all() and (stats.reverse_kl >= 0).all()
    if kind.kind == "jsd":
        assert stats.loss.max() <= math.log(2) + 1e-6


@every_target
@every_divergence
def test_a_constant_added_to_either_row_changes_nothing(target: Target, kind: Divergence) -> None:
    student, teacher = (x.double() for x in pair(1))
    stats, gradient = run(student, teacher, target, kind)
    moved, moved_gradient = run(student + 321.0, teacher - 123.0, target, kind)
    torch.testing.assert_close(moved_gradient, gradient, rtol=0, atol=1e-11)
    for name in ("loss", "beta", "student_entropy", "target_entropy", "target_log_prob", "grid_entropies"):
        torch.testing.assert_close(getattr(moved, name), getattr(stats, name), rtol=0, atol=1e-11)


@every_backend(cases=2, quick=0)
@every_target
@every_divergence
def test_permuting_the_vocabulary_permutes_the_gradient(target: Target, kind: Divergence) -> None:
    student, teacher = pair(2)
    order = torch.randperm(257, generator=torch.Generator().manual_seed(0))
    stats, gradient = run(student, teacher, target, kind)
    permuted, permuted_gradient = run(student[:, order], teacher[:, order], target, kind)
    torch.testing.assert_close(permuted_gradient, gradient[:, order], rtol=0, atol=1e-6)
    torch.testing.assert_close(permuted.loss, stats.loss, rtol=0, atol=2e-6)
    assert torch.equal(permuted.top1_agreement, stats.top1_agreement)


@every_backend(cases=5)
@combinations(
    target={f"{it.rule}-{it.k_max}": it for it in TARGETS},
    kind={f"{it.kind}-{it.order}": it for it in [*DIVERGENCES, *RENYI]},
    side=["student", "teacher"],
    value=[torch.nan, torch.inf],
)
def test_nan_and_infinity_stay_in_their_row(target: Target, kind: Divergence, side: str, value: float) -> None:
    student, teacher = pair(3)
    clean, clean_gradient = run(student, teacher, target, kind)
    (student if side == "student" else teacher)[4, 100] = value
    stats, gradient = run(student, teacher, target, kind)
    others = torch.arange(8) != 4
    assert torch.isnan(stats.loss[4]) and torch.isnan(gradient[4]).all()
    assert torch.equal(stats.loss[others], clean.loss[others])
    assert torch.equal(gradient[others], clean_gradient[others])
    if target.rule == "entropy_matched":
        assert torch.isnan(stats.beta[4]) and stats.status[4] == Status.UNDETERMINED


@every_backend(cases=4)
@every_target
@pytest.mark.parametrize("kind", [*DIVERGENCES, *RENYI], ids=str)
def test_columns_of_minus_infinity_equal_removed_columns(target: Target, kind: Divergence) -> None:
    student, teacher = pair(4)
    kept = torch.rand(257, generator=torch.Generator().manual_seed(1)) < 0.6
    kept[:150], kept[0] = False, True  # whole blocks of a kernel have no column
    masked = run(student.masked_fill(~kept, -torch.inf), teacher.masked_fill(~kept, -torch.inf), target, kind)
    removed = run(student[:, kept], teacher[:, kept], target, kind)
    for name in ("loss", "reverse_kl", "beta", "teacher_entropy", "target_entropy", "target_log_prob"):
        torch.testing.assert_close(getattr(masked[0], name), getattr(removed[0], name), rtol=4e-6, atol=2e-6)
    torch.testing.assert_close(masked[1][:, kept], removed[1], rtol=1e-5, atol=1e-6)
    assert (masked[1][:, ~kept] == 0).all()


@every_backend(cases=2)
@every_target
def test_a_column_that_only_the_teacher_forbids_makes_reverse_kl_infinite_and_no_other(target: Target) -> None:
    student, teacher = pair(5)
    teacher[2, 7] = -torch.inf
    stats, gradient = run(student, teacher, target, Divergence("reverse_kl"))
    assert stats.loss[2] == torch.inf and not torch.isfinite(gradient[2]).all()
    assert torch.isfinite(stats.loss[3:]).all() and torch.isfinite(gradient[3:]).all()
    for kind in DIVERGENCES[1:]:
        stats, gradient = run(student, teacher, target, kind)
        assert stats.reverse_kl[2] == torch.inf
        assert torch.isfinite(stats.loss).all() and torch.isfinite(gradient).all()


@every_backend(cases=3, quick=0)
@every_divergence
def test_a_column_that_only_the_student_forbids_is_gone_from_the_mix(kind: Divergence) -> None:
    student, teacher = pair(6)
    student[:, 9] = -torch.inf
    stats, gradient = run(student, teacher, Target(anchor="student"), kind)
    assert torch.isfinite(stats.loss).all() and (gradient[:, 9] == 0).all()
    alone, _ = run(student, teacher, Target("teacher_alone", anchor="student"), kind)
    assert torch.isfinite(alone.loss).all() == (kind.kind != "forward_kl")


@every_backend(cases=3, quick=0)
@every_divergence
def test_extreme_disagreement_stays_exact(kind: Divergence) -> None:
    student, teacher = torch.zeros(2, 50), torch.zeros(2, 50)
    student[:, 0], teacher[:, 1] = 300.0, 400.0
    teacher[1, 1] = 401.0
    stats, gradient = run(student, teacher, Target("fixed", k=1.0, anchor="student"), kind)
    # q is certain of column 1 or nearly undecided between 0 and 1; p is certain of column 0
    q = torch.tensor([[300.0, 300.0], [300.0, 300.75]]).double().softmax(1)
    kl = -q[:, 0].log()
    expected = {
        "reverse_kl": kl,
        "forward_kl": (q * q.log()).sum(1) + q[:, 1] * 300,
        "jsd": 0.5 * (q[:, 1] * math.log(2) + q[:, 0] * (q[:, 0] / (0.5 * q[:, 0] + 0.5)).log())
        - 0.5 * (0.5 * q[:, 0] + 0.5).log(),
    }[kind.kind]
    torch.testing.assert_close(stats.loss.double(), expected, rtol=1e-6, atol=1e-6)
    assert torch.isfinite(gradient).all() and gradient.sum(1).abs().max() < 1e-5


@every_backend(cases=1)
def test_one_valid_column_and_uniform_rows_have_no_loss_and_no_gradient() -> None:
    for target in TARGETS if BACKEND == "torch" else TARGETS[:1]:
        stats, gradient = run(torch.randn(3, 1), torch.randn(3, 1), target, Divergence())
        assert stats.loss.abs().max() == 0 and gradient.abs().max() == 0
        assert torch.isfinite(stats.beta).all()
        assert target.rule != "entropy_matched" or (stats.status == Status.UNDETERMINED).all()
        stats, gradient = run(torch.zeros(3, 90), torch.ones(3, 90), target, Divergence())
        assert stats.loss.abs().max() <= 1e-12 and gradient.abs().max() <= 1e-9
        assert (stats.student_entropy - math.log(90)).abs().max() < 1e-6


@every_backend(cases=1)
def test_equal_maxima_count_by_their_lowest_column_within_and_across_blocks() -> None:
    student, teacher = torch.zeros(4, 400), torch.zeros(4, 400)
    student[:, [3, 311]] = 5.0
    teacher[0, [3, 15]] = teacher[1, [311, 320]] = teacher[2, [3, 399]] = teacher[3, [2, 3]] = 5.0
    stats, _ = run(student, teacher, Target(anchor="student"), Divergence())
    assert stats.top1_agreement.tolist() == [True, False, True, False]


@every_backend(cases=3)
@every_divergence
def test_a_tiny_divergence_keeps_its_digits(kind: Divergence) -> None:
    generator = torch.Generator().manual_seed(8)
    student = 2 * torch.randn(5, 300, generator=generator)
    teacher = student + 1e-3 * torch.randn(5, 300, generator=generator)
    stats, gradient = run(student, teacher, Target("fixed", anchor="student"), kind)
    s = student.double().requires_grad_()
    loss = divergence(s.log_softmax(-1), ((s.detach() + 0.75 * teacher.double()) / 1.75).log_softmax(-1), kind)
    (expected,) = torch.autograd.grad(loss.sum(), s)
    assert loss.min() > 1e-9 and loss.max() < 2e-7
    torch.testing.assert_close(stats.loss.double(), loss.detach(), rtol=0, atol=3e-10)
    torch.testing.assert_close(gradient.double(), expected, rtol=0, atol=2e-7)


@every_backend(cases=4, quick=0)
@pytest.mark.parametrize(("order", "top"), [("as drawn", 130), ("rising", 0), ("rising", 299), ("falling", 299)])
def test_an_almost_certain_row_keeps_the_digits_of_its_entropy_wherever_its_top_lies(order: str, top: int) -> None:
    student = torch.randn(6, 300, generator=torch.Generator().manual_seed(3))
    if order != "as drawn":
        student = student.sort(1, descending=order == "falling").values
    student[:, top] = torch.tensor([14.0, 18.0, 20.0, 22.0, 25.0, 28.0])
    stats, _ = run(student, student, Target(anchor="student"), Divergence())
    x = student.double() - student[:, top, None].double()
    others = x.masked_fill(x == 0, -torch.inf).exp()
    exact = others.sum(1).log1p() - (others * x).sum(1) / (1 + others.sum(1))
    assert exact.min() < 1e-8
    torch.testing.assert_close(stats.student_entropy.double(), exact, rtol=3e-6, atol=0)
    beta = stats.beta[stats.status != Status.UNDETERMINED] * 1.75
    torch.testing.assert_close(beta, torch.ones_like(beta), rtol=0, atol=1e-6)
