# Copyright (c) 2026 the megatron_selfdistill authors. Apache-2.0.
"""The claims about the loss's Triton kernels: a pytest module that test_kernels.py runs in a process of its own.

With TRITON_INTERPRET=1, which must be set before triton is imported, the kernels run on CPU tensors in Triton's
interpreter; without it they run on the GPU, which conftest.py shows with SELFDISTILL_TEST_GPU=1 only.
"""

from __future__ import annotations

import itertools
import os
import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import fields, replace
from datetime import timedelta
from functools import partial
from types import ModuleType
from typing import Any

import plateaus
import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from bytes_alive import BytesAlive
from torch import Tensor

from megatron_selfdistill.choices import FUSED_MODES
from megatron_selfdistill.loss import (
    Divergence,
    Status,
    Target,
    TokenStats,
    VocabShard,
    distillation_loss,
    mixed_target,
    solve_target,
)
from megatron_selfdistill.loss.sharded import shard_sums, token_statistics
from megatron_selfdistill.loss.sharded.beta_grid import BetaGrid
from megatron_selfdistill.loss.sharded.fused_linear import fused_distillation_loss
from megatron_selfdistill.loss.sharded.shard_sums import Shard
from megatron_selfdistill.loss.sharded.solver import BetaSolution
from megatron_selfdistill.loss.sharded.token_statistics import MergedSums
from megatron_selfdistill.loss.triton import pass_launches, solver_launches

INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"
DEVICE = torch.device("cpu" if INTERPRETED else "cuda")
FULL = [pytest.mark.full] if INTERPRETED else []
"""The marks of cases that make test skips, because the interpreter takes half a second for a loss."""
TARGETS = {
    "capped": Target(),
    "strict": Target(k_max=None),
    "k_max 2.2": Target(k_max=2.2),
    "fixed": Target("fixed", k=1.3),
    "batch": Target("batch", k=1.9, k_max=None),
    "teacher alone": Target("teacher_alone"),
    "other weight": Target(teacher_weight=2.6, k_max=None),
    "no teacher": Target(teacher_weight=0.0, k_max=None),
}
DIVERGENCES = {"reverse": Divergence("reverse_kl"), "forward": Divergence("forward_kl"), "jsd": Divergence("jsd", 0.3)}
pytestmark = pytest.mark.filterwarnings("ignore:.*encountered in:RuntimeWarning")


@pytest.fixture(autouse=True)
def parts(monkeypatch: pytest.MonkeyPatch, request: pytest.FixtureRequest) -> int:
    """Read whole rows, unless the test asks for parts.

    A handful of rows would otherwise be cut into as many parts as there are blocks.
    """
    number = getattr(request, "param", 1)
    if INTERPRETED:
        monkeypatch.setattr(pass_launches, "LANES", 64)  # it pays per block, not per number
    monkeypatch.setattr(pass_launches, "PART_COLUMNS", 1 if number > 1 else 1 << 30)
    monkeypatch.setattr(pass_launches, "MOST_PARTS", number)
    return number


def full(test: Callable[..., None]) -> Callable[..., None]:
    """Leave a whole test to make test-all, in the interpreter; test_kernels.py finds it by this decorator's name."""
    return pytest.mark.full(test) if INTERPRETED else test


def after(number: int, some: Iterable) -> list:
    """Return the cases, of which those after the first ``number`` run in make test-all only, in the interpreter."""
    cases = [pytest.param(*(case if isinstance(case, tuple) else (case,)), marks=FULL) for case in some]
    return [*list(some)[:number], *cases[number:]]


def cases(names: str, thinned: list, *values: Iterable, quick: int) -> pytest.MarkDecorator:
    """Run all combinations on a GPU; in the interpreter run ``thinned``, in make test its first ``quick`` only."""
    combinations = (
        after(quick, thinned) if INTERPRETED else list(itertools.product(*values) if len(values) > 1 else values[0])
    )
    return pytest.mark.parametrize(names, combinations, indirect=sorted({"parts"} & set(names.split(", "))))


def logits(num_rows: int, num_columns: int, seed: int = 0) -> tuple[Tensor, Tensor, Tensor]:
    """Return float32 logits of student and teacher on DEVICE, and response tokens.

    The rows are sharp, flat, agreeing, disagreeing, equal, rising, falling and tied.
    """
    generator = torch.Generator().manual_seed(seed)
    scale = torch.linspace(0.5, 6.0, num_rows)[:, None]
    student = scale * torch.randn(num_rows, num_columns, generator=generator)
    teacher = student + torch.randn(num_rows, num_columns, generator=generator)
    teacher[::3] = 4 * torch.randn(teacher[::3].shape, generator=generator)
    ramp = torch.linspace(-30, 10, num_columns)
    for row, values in ((1, (student[1], student[1])), (2, (ramp, ramp.flip(0))), (4, (ramp, 2 * ramp))):
        student[row], teacher[row] = values
    student[5] = teacher[5] = student[5].round()
    student[6], teacher[6] = ramp.flip(0), teacher[6] + 2000.0
    tokens = torch.randint(num_columns, (num_rows,), generator=generator)
    return student.to(DEVICE), teacher.to(DEVICE), tokens.to(DEVICE)


def run(
    student: Tensor,
    teacher: Tensor,
    tokens: Tensor,
    target: Target,
    kind: Divergence,
    *,
    backend: str = "triton",
    vocab: VocabShard | None = None,
    **options: bool | str,
) -> tuple[TokenStats, Tensor]:
    leaf = student.clone(memory_format=torch.preserve_format).requires_grad_()
    vocab = vocab or VocabShard(0, student.shape[1], student.shape[1])
    arguments = {"target": target, "divergence": kind, "vocab": vocab, "backend": backend}
    stats = distillation_loss(leaf, teacher, tokens, **arguments, **options)
    (stats.loss * torch.linspace(-1, 2, len(tokens), device=DEVICE)).sum().backward()
    stats.loss = stats.loss.detach()
    assert leaf.grad is not None
    return stats, leaf.grad


def reference(student: Tensor, teacher: Tensor, target: Target, kind: Divergence) -> tuple[Tensor, Tensor]:
    """Return the loss, and its gradient under the weights of `run`, by the definition in float64."""
    s = student.double().detach().requires_grad_()
    log_q = mixed_target(s.detach(), teacher.double(), target).log_q
    log_p, lam = s.log_softmax(-1), kind.jsd_lambda

    def kl(a: Tensor, b: Tensor) -> Tensor:
        return (a.exp() * (a - b)).sum(-1)

    if kind.kind == "jsd":
        log_m = (lam * log_q.exp() + (1 - lam) * log_p.exp()).log()
        loss = lam * kl(log_q, log_m) + (1 - lam) * kl(log_p, log_m)
    else:
        loss = kl(log_p, log_q) if kind.kind == "reverse_kl" else kl(log_q, log_p)
    weights = torch.linspace(-1, 2, len(s), dtype=torch.float64, device=DEVICE)
    return loss.detach(), torch.autograd.grad((loss * weights).sum(), s)[0]


def assert_same(ours: TokenStats, theirs: TokenStats, tolerance: float = 5e-6) -> None:
    """Assert that every statistic is alike, with NaN and infinity at the same places."""
    for field in fields(TokenStats):
        a, b = getattr(ours, field.name), getattr(theirs, field.name)
        assert a.dtype == b.dtype and a.shape == b.shape, field.name
        close = {"rtol": tolerance, "atol": tolerance, "equal_nan": True}
        torch.testing.assert_close(a, b, **close, msg=lambda m, name=field.name: f"{name}: {m}")


@cases(
    "rule, kind",
    [*zip(TARGETS, itertools.cycle(DIVERGENCES), strict=False), ("capped", "forward"), ("strict", "jsd")],
    TARGETS,
    DIVERGENCES,
    quick=3,
)
def test_loss_and_gradient_equal_float64_and_every_statistic_pytorchs(rule: str, kind: str) -> None:
    student, teacher, tokens = logits(8, 333)
    vocab = VocabShard(0, 333, 300)  # the rest is padding
    arguments = student, teacher, tokens, TARGETS[rule], DIVERGENCES[kind]
    (stats, ours), (theirs, _) = (run(*arguments, vocab=vocab, backend=name) for name in ("triton", "torch"))
    loss, gradient = reference(student[:, :300], teacher[:, :300], TARGETS[rule], DIVERGENCES[kind])
    torch.testing.assert_close(stats.loss.double(), loss, rtol=1e-5, atol=5e-6)
    torch.testing.assert_close(ours[:, :300].double(), gradient, rtol=1e-4, atol=3e-6)
    assert (ours[:, 300:] == 0).all()
    assert_same(stats, theirs)


SHAPES = [  # columns, columns that are no padding, dtypes
    (128, 128, torch.float32, torch.float32),
    (300, 255, torch.float32, torch.float32),
    (1, 1, torch.float32, torch.float32),
    (528, 500, torch.bfloat16, torch.float32),
    (130, 129, torch.float32, torch.float32),
    (127, 127, torch.float32, torch.float32),
    (700, 0, torch.float32, torch.float32),
    (700, 512, torch.bfloat16, torch.bfloat16),
    (1111, 1100, torch.bfloat16, torch.bfloat16),
    (257, 257, torch.float16, torch.float16),
    (520, 500, torch.bfloat16, torch.float32),
    (520, 500, torch.float32, torch.bfloat16),
    (1104, 1100, torch.bfloat16, torch.bfloat16),
    (1040, 1030, torch.float16, torch.bfloat16),
]


@pytest.mark.parametrize(("size", "num_valid", "student_dtype", "teacher_dtype"), after(4, SHAPES))
def test_the_first_pass_of_any_shape_equals_float64(
    size: int, num_valid: int, student_dtype: torch.dtype, teacher_dtype: torch.dtype
) -> None:
    student, teacher, tokens = logits(8, size)
    student, teacher = student.to(student_dtype)[:, :num_valid], teacher.to(teacher_dtype)[:, :num_valid]
    assert_first_pass(Shard(student, teacher, Target().mix_weights, torch.float32), tokens, Target())


@cases(
    "rule, num_parts",
    [("strict", 1), ("strict", 8), ("fixed", 3), ("teacher alone", 3), ("no teacher", 3)],
    ["strict", "fixed", "teacher alone", "no teacher"],
    [1, 3, 8],
    quick=1,
)
def test_the_first_pass_in_parts_equals_float64(rule: str, num_parts: int) -> None:
    student, teacher, tokens = logits(8, 900, seed=2)
    shard = Shard(student, teacher, TARGETS[rule].mix_weights, torch.float32, num_parts)
    assert_first_pass(shard, tokens, TARGETS[rule])


@full
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_words_read_16_bytes_at_a_time_give_the_bits_of_columns_read_one_by_one(dtype: torch.dtype) -> None:
    student, teacher, tokens = logits(7, 1300, seed=10)
    student, teacher = student.to(dtype), teacher.to(dtype)
    shifted = [torch.empty(7, 1328, device=DEVICE, dtype=dtype)[:, 1:1301].copy_(x) for x in (student, teacher)]
    aligned = [torch.empty(7, 1328, device=DEVICE, dtype=dtype)[:, :1300].copy_(x) for x in (student, teacher)]
    found = []
    for packed, rows in ((True, aligned), (False, shifted)):
        shard = Shard(*rows, Target().mix_weights, torch.float32, 2)
        assert pass_launches.is_packed(shard) == packed
        sums, argmax = pass_launches.first_pass(shard, BetaGrid.of(Target(), torch.float32), tokens, 0)
        solver_state = solver_launches.solve_tokens(sums, BetaGrid.of(Target(), torch.float32))
        second = pass_launches.second_pass(shard, solver_state.constants, argmax, forward_kl=True)
        found.append((sums, argmax, second, pass_launches.jsd_pass(shard, solver_state.constants, 0.3)))
    for ours, theirs in zip(*found, strict=True):
        assert torch.equal(ours, theirs)


def assert_first_pass(shard: Shard, tokens: Tensor, target: Target, start: int = 50) -> None:
    grid = BetaGrid.of(target, torch.float32)
    ours, argmax = pass_launches.first_pass(shard, grid, tokens + start, start)
    wide = Shard(shard.student.double(), shard.teacher.double(), shard.mix_weights, torch.float64)
    exact, _ = shard_sums.first_pass(wide, replace(grid, dtype=torch.float64), tokens + start, start)
    assert ours.shape == (shard.num_parts, *exact.shape[1:]) and argmax.shape == ours.shape[:2]
    if shard.student.shape[1] == 0:
        assert torch.equal(ours[0], exact[0].float())
        return
    ours, exact = MergedSums.merge(ours.double(), grid), MergedSums.merge(exact, grid)
    for side in ("student", "teacher"):
        a, b = getattr(ours, side), getattr(exact, side)
        assert torch.equal(a.maximum, b.maximum) and torch.equal(a.argmax, b.argmax)
        torch.testing.assert_close(a.log_sum, b.log_sum, rtol=2e-6, atol=1e-12)
        torch.testing.assert_close(a.entropy, b.entropy, rtol=3e-6, atol=1e-12)
    kept = torch.arange(8, device=DEVICE) != 6
    torch.testing.assert_close(ours.mix_max[kept], exact.mix_max[kept], rtol=0, atol=5e-6)
    for name in ("log_sum", "mean", "variance", "third"):
        a, b = getattr(ours.mix, name)[kept], getattr(exact.mix, name)[kept]
        torch.testing.assert_close(a, b, rtol=2e-5, atol=2e-5 * b.abs().max().item())
    torch.testing.assert_close(ours.mix.entropy[kept], exact.mix.entropy[kept], rtol=1e-5, atol=5e-6)
    assert torch.equal(ours.max_entropy, exact.max_entropy)
    assert torch.equal(torch.stack(ours.token_logits), torch.stack(exact.token_logits))


@cases(
    "order, top",
    [("as drawn", 130), ("rising", 0), ("rising", 299), ("falling", 299)],
    ["as drawn", "rising", "falling"],
    [0, 130, 299],
    quick=1,
)
def test_an_almost_certain_row_keeps_the_digits_of_its_entropy_wherever_its_top_lies(order: str, top: int) -> None:
    student = torch.randn(6, 300, generator=torch.Generator().manual_seed(3))
    if order != "as drawn":
        student = student.sort(1, descending=order == "falling").values
    student[:, top] = torch.tensor([14.0, 18.0, 20.0, 22.0, 25.0, 28.0])
    student = student.to(DEVICE)
    stats, _ = run(student, student, torch.zeros(6, dtype=torch.int64, device=DEVICE), Target(), Divergence())
    x = student.double() - student[:, top, None].double()
    others = x.masked_fill(x == 0, -torch.inf).exp()
    tail = others.sum(1)
    exact = tail.log1p() - (others * x).sum(1) / (1 + tail)
    assert exact.min() < 1e-8
    torch.testing.assert_close(stats.student_entropy.double(), exact, rtol=3e-6, atol=0)
    beta = stats.beta[stats.status != Status.UNDETERMINED] * 1.75
    torch.testing.assert_close(beta, torch.ones_like(beta), rtol=0, atol=1e-6)


@full
@cases("kind, parts", [("forward", 5), ("jsd", 2)], DIVERGENCES, [2, 5], quick=1)
def test_rows_cut_into_parts_equal_whole_rows(kind: str, parts: int, monkeypatch: pytest.MonkeyPatch) -> None:
    student, teacher, tokens = logits(7, 600, seed=4)
    cut = run(student, teacher, tokens, Target(), DIVERGENCES[kind])
    assert pass_launches.num_parts(7, 600) == parts
    monkeypatch.setattr(pass_launches, "MOST_PARTS", 1)
    whole = run(student, teacher, tokens, Target(), DIVERGENCES[kind])
    assert_same(cut[0], whole[0])
    torch.testing.assert_close(cut[1], whole[1], rtol=1e-5, atol=1e-6)


def test_few_rows_are_cut_into_parts_and_many_are_not(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.undo()
    assert pass_launches.num_parts(16384, 19008) == pass_launches.num_parts(4096, 19008) == 1
    assert pass_launches.num_parts(2048, 19008) == 2 and pass_launches.num_parts(64, 19008) == 9
    assert pass_launches.num_parts(1, 152064) == 64 and pass_launches.num_parts(1, 100) == 1


@cases(
    "rule, kind, parts",
    [
        *(("capped", kind, 2) for kind in DIVERGENCES),
        ("teacher alone", "reverse", 5),
        ("teacher alone", "forward", 1),
        ("no teacher", "forward", 1),
    ],
    ["capped", "teacher alone", "no teacher"],
    DIVERGENCES,
    [1, 2, 5],
    quick=1,
)
def test_infinities_and_nan_come_out_as_pytorchs(rule: str, kind: str, parts: int) -> None:
    student, teacher, tokens = logits(13, 512, seed=5)
    masked = torch.rand(512, generator=torch.Generator().manual_seed(1)).to(DEVICE) < 0.5
    masked[:200] = True  # the first blocks hold no column at all
    student[0, masked] = teacher[0, masked] = -torch.inf
    student[1, masked] = -torch.inf
    teacher[2, 330] = -torch.inf
    student[3, 10], teacher[4, 340] = torch.nan, torch.nan
    student[5, 340], teacher[6, 10] = torch.inf, torch.inf
    student[7, masked] = teacher[7, masked] = torch.finfo(torch.float32).min
    student[8, :511] = teacher[8, :511] = -torch.inf
    teacher[9, masked] = -torch.inf
    student[10], teacher[10] = 0.0, 1.0
    # the last block has neither a new maximum nor an end that a mask cuts, only a column that is missing
    student[11:] = teacher[11:] = torch.linspace(30, -10, 512)
    student[11, 340] = teacher[12, 340] = -torch.inf
    arguments = student, teacher, tokens, TARGETS[rule], DIVERGENCES[kind]
    (ours, gradient), (theirs, expected) = (run(*arguments, backend=name) for name in ("triton", "torch"))
    # of a row with NaN or +inf all that is promised is NaN
    sound = ~torch.isnan(theirs.loss)
    assert torch.equal(torch.isnan(ours.loss), ~sound) and sound.sum() >= 7
    for field in fields(TokenStats):
        if field.name != "grid_betas":
            a, b = getattr(ours, field.name)[sound], getattr(theirs, field.name)[sound]
            torch.testing.assert_close(a, b, rtol=5e-6, atol=5e-6, equal_nan=True, msg=lambda m, f=field: f"{f}: {m}")
    assert torch.equal(torch.isfinite(gradient), torch.isfinite(expected))
    finite = torch.isfinite(expected)
    torch.testing.assert_close(gradient[finite], expected[finite], rtol=1e-5, atol=2e-6)


@cases(
    "name, rule, kind, parts",
    [
        ("third pass", "capped", "reverse", 1),
        ("third pass", "strict", "forward", 3),
        ("third pass", "capped", "jsd", 2),
        ("two tied tops", "strict", "reverse", 1),
        ("three tied tops", "capped", "forward", 2),
        ("forks, bf16", "strict", "jsd", 1),
        ("forks, teacher 6 nats less sure, bf16", "capped", "forward", 1),
        ("levels", "strict", "reverse", 2),
    ],
    ["third pass", *plateaus.CLASSES],
    plateaus.TARGETS,
    DIVERGENCES,
    [1, 2, 3],
    quick=1,
)
def test_every_row_is_matched_where_the_entropy_has_a_plateau(name: str, rule: str, kind: str, parts: int) -> None:
    rows = plateaus.needing_the_third_pass() if name == "third pass" else plateaus.draw(name, num_columns=320)
    student, teacher, tokens = (values.to(DEVICE) for values in rows)
    leaf = student.float().requires_grad_()
    arguments = {"target": TARGETS[rule], "divergence": DIVERGENCES[kind], "vocab": VocabShard(0, 320, 320)}
    stats = distillation_loss(leaf, teacher, tokens, **arguments, backend="triton")
    stats.loss.sum().backward()
    stats.loss = stats.loss.detach()
    plateaus.assert_solved(stats, leaf.grad, (student, teacher, tokens), TARGETS[rule], DIVERGENCES[kind])


def test_the_third_pass_leaves_every_other_row_as_it_was() -> None:
    student, teacher, tokens = (values.to(DEVICE) for values in plateaus.needing_the_third_pass())
    grid = BetaGrid.of(Target(), torch.float32)
    shard = Shard(student, teacher, grid.mix_weights, torch.float32)
    sums, argmax = pass_launches.first_pass(shard, grid, tokens, 0)
    solver_state, status, found = solver_launches.solve_tokens(sums, grid), None, []
    for _ in range(2):
        sums = pass_launches.second_pass(shard, solver_state.constants, argmax, forward_kl=False, status=status)
        rows, solver_state = solver_launches.finish_tokens(solver_state, sums, grid, tokens, 320)
        status = rows.status
        found.append((sums.clone(), status.tolist(), rows.beta.clone(), rows.reverse_kl.clone()))
    (_, second, *before), (sums, third, *after) = found
    assert [value == Status.UNCONVERGED for value in second] == [True, False, True, False]
    assert Status.UNCONVERGED not in third and third[1::2] == second[1::2]
    assert (sums[:, 1::2] == 0).all() and (sums[:, ::2, 0] != 0).all()
    for one, other in zip(before, after, strict=True):
        assert torch.equal(one[1::2], other[1::2]) and (one[::2] != other[::2]).all()


def test_equal_maxima_count_by_their_lowest_column_within_and_across_blocks() -> None:
    student, teacher = torch.zeros(4, 400, device=DEVICE), torch.zeros(4, 400, device=DEVICE)
    student[:, [3, 311]] = 5.0
    teacher[0, [3, 15]] = teacher[1, [311, 320]] = teacher[2, [3, 399]] = teacher[3, [2, 3]] = 5.0
    stats, _ = run(student, teacher, torch.zeros(4, dtype=torch.int64, device=DEVICE), Target(), Divergence())
    assert stats.top1_agreement.tolist() == [True, False, True, False]


@pytest.mark.parametrize("kind", after(1, DIVERGENCES))
def test_a_tiny_divergence_keeps_its_digits(kind: str) -> None:
    generator = torch.Generator().manual_seed(8)
    student = 2 * torch.randn(5, 300, generator=generator)
    teacher = (student + 1e-3 * torch.randn(5, 300, generator=generator)).to(DEVICE)
    student, tokens = student.to(DEVICE), torch.zeros(5, dtype=torch.int64, device=DEVICE)
    stats, gradient = run(student, teacher, tokens, Target("fixed"), DIVERGENCES[kind])
    loss, expected = reference(student, teacher, Target("fixed"), DIVERGENCES[kind])
    assert loss.min() > 1e-9 and loss.max() < 2e-7
    torch.testing.assert_close(stats.loss.double(), loss, rtol=0, atol=3e-10)
    torch.testing.assert_close(gradient.double(), expected, rtol=0, atol=2e-7)


@full
@cases("kind", ["jsd"], DIVERGENCES, quick=1)
def test_strided_rows_and_backward_in_place_give_the_same_bits(kind: str) -> None:
    student, teacher, tokens = logits(8, 333)
    target, divergence = Target(), DIVERGENCES[kind]
    stats, gradient = run(student, teacher, tokens, target, divergence)
    wide = torch.full((8, 400), torch.nan, device=DEVICE)
    wide[:, :333] = student
    results: list[Tensor] = []
    hidden = wide.requires_grad_()[:, :333]
    hidden.register_hook(results.append)
    vocab = VocabShard(0, 333, 333)
    arguments = {"target": target, "divergence": divergence, "vocab": vocab, "backend": "triton"}
    loss = distillation_loss(hidden, teacher, tokens, **arguments).loss
    (loss * torch.linspace(-1, 2, 8, device=DEVICE)).sum().backward()
    assert torch.equal(loss, stats.loss) and torch.equal(results[0], gradient)

    leaf = student.clone().requires_grad_()
    product = leaf * 1
    product.register_hook(results.append)
    loss = distillation_loss(product, teacher, tokens, **arguments, inplace_backward=True).loss
    (loss * torch.linspace(-1, 2, 8, device=DEVICE)).sum().backward()
    assert torch.equal(results[1], gradient) and results[1].data_ptr() == product.data_ptr()


@full
@cases(
    "dtype, kind",
    [(torch.bfloat16, "reverse"), (torch.float16, "forward")],
    [torch.bfloat16, torch.float16],
    DIVERGENCES,
    quick=1,
)
def test_narrow_logits_give_the_statistics_of_the_same_values_in_float32(dtype: torch.dtype, kind: str) -> None:
    student, teacher, tokens = logits(8, 600)
    student, teacher = student.to(dtype), teacher.to(dtype)
    narrow, gradient = run(student, teacher, tokens, Target(), DIVERGENCES[kind])
    wide, expected = run(student.float(), teacher.float(), tokens, Target(), DIVERGENCES[kind])
    assert_same(narrow, wide)
    assert gradient.dtype == dtype
    # the interpreter cuts digits off where a GPU rounds
    digits = torch.finfo(dtype).eps
    torch.testing.assert_close(gradient.float(), expected, rtol=digits, atol=1e-6)


def bracket_of(solution: BetaSolution) -> Tensor:
    """Return both ends of the bracket, [10, T], in the order of the kernels' state."""
    return torch.stack([*solution.left.tensors(), *solution.right.tensors()])


@cases("rule, forward_kl", [("capped", False), *((rule, True) for rule in TARGETS)], TARGETS, [False, True], quick=2)
def test_the_solving_kernels_equal_the_solver_in_pytorch(rule: str, forward_kl: bool) -> None:
    """Compare both on the same sums, of 3 shards."""
    student, teacher, tokens = logits(40, 600, seed=7)
    student[30], teacher[31] = torch.nan, -1e4
    student[32:], teacher[32:] = student[32:] * 0.02, teacher[32:] * 5
    # one column above a bulk that melts within one cell of the grid: the last step of the solver is long
    student[20:30], teacher[20:30] = 0.1 * student[20:30], 0.1 * teacher[20:30]
    student[20:30, 0], teacher[20:30, 0] = torch.linspace(5, 9, 10), 3.0
    fork, fork_of_teacher, _ = plateaus.needing_the_third_pass(600)
    student[9], teacher[9] = fork[0].to(DEVICE), fork_of_teacher[0].to(DEVICE)
    weight = round(8 * TARGETS[rule].teacher_weight) / 8  # as exact in a kernel's float32 as in Python
    grid = BetaGrid.of(replace(TARGETS[rule], teacher_weight=weight), torch.float32)
    shards = [
        Shard(student[:, i : i + 200], teacher[:, i : i + 200], grid.mix_weights, torch.float32) for i in (0, 200, 400)
    ]
    passes = [shard_sums.first_pass(shard, grid, tokens, 200 * i) for i, shard in enumerate(shards)]
    gathered = torch.cat([sums for sums, _ in passes])
    results, brackets = [], []
    for module in (solver_launches, token_statistics):
        solver_state, status = module.solve_tokens(gathered, grid), None
        for _ in range(1 if grid.given else 2):
            parts = [
                shard_sums.second_pass(shard, solver_state.constants, argmax, forward_kl=forward_kl, status=status)
                for shard, (_, argmax) in zip(shards, passes, strict=True)
            ]
            rows, solver_state = module.finish_tokens(solver_state, torch.cat(parts), grid, tokens, 600)
            needed, status = status, rows.status.clone()
            if needed is None:
                ends = solver_state.state[6:16] if module is solver_launches else bracket_of(solver_state.solution)
                brackets.append(ends[:, status == Status.UNCONVERGED].clone())
        results.append(rows)
        assert grid.given or weight != 0.75 or needed[9] == Status.UNCONVERGED
    torch.testing.assert_close(*brackets, rtol=1e-6, atol=1e-12)
    ours, theirs = results
    for field in fields(theirs):
        pairs = [(getattr(ours, field.name), getattr(theirs, field.name))]
        if field.name == "constants":
            pairs = list(zip(pairs[0][0].tensors(), pairs[0][1].tensors(), strict=True))
        for a, b in pairs:
            assert a.dtype == b.dtype and a.shape == b.shape, field.name
            tolerances = {"rtol": 2e-7, "atol": 1e-9, "equal_nan": True}  # two roundings to float32
            torch.testing.assert_close(a, b, **tolerances, msg=lambda m, f=field: f"{f.name}: {m}")


def test_solve_target_finds_what_the_loss_finds_bit_for_bit() -> None:
    student, teacher, tokens = logits(8, 333)
    vocab = VocabShard(0, 333, 333)
    solution = solve_target(student, teacher, Target(), vocab, backend="triton")
    stats, _ = run(student, teacher, tokens, Target(), Divergence())
    assert torch.equal(solution.beta.float(), stats.beta)
    mix = student.double() + 0.75 * teacher.double()
    log_q = solution.beta[:, None] * mix - solution.log_normaliser[:, None]
    torch.testing.assert_close(log_q.exp().sum(1)[:6], torch.ones(6, device=DEVICE).double(), rtol=0, atol=3e-6)


def test_what_the_kernels_cannot_read_is_refused_with_a_sentence() -> None:
    student, teacher, tokens = logits(8, 64)
    with pytest.raises(ValueError, match=r"whose columns lie side by side; got strides \(1, 8\)"):
        run(student.t().contiguous().t(), teacher, tokens, Target(), Divergence())
    with pytest.raises(ValueError, match="take bfloat16, float16 and float32, and the logits are float64"):
        run(student.double(), teacher, tokens, Target(), Divergence())


def test_no_rows_and_rows_of_one_column_have_no_loss() -> None:
    for num_rows, num_columns in ((0, 50), (3, 1)):
        student, teacher = (torch.randn(num_rows, num_columns, device=DEVICE) for _ in range(2))
        tokens = torch.zeros(num_rows, dtype=torch.int64, device=DEVICE)
        for kind in DIVERGENCES.values():
            stats, gradient = run(student, teacher, tokens, Target(), kind)
            assert (stats.loss == 0).all() and (gradient == 0).all() and gradient.shape == student.shape


def wait_for(context: mp.ProcessContext, seconds: float = 900) -> None:
    """Wait until every rank has ended, and raise what one of them raised.

    After so many seconds all ranks are killed.
    """
    deadline = time.monotonic() + seconds
    while not context.join(timeout=max(0.0, deadline - time.monotonic())):
        if time.monotonic() >= deadline:
            for process in context.processes:
                process.kill()
            raise TimeoutError(f"the ranks are not done after {seconds:g} s")


def rank_of_two(rank: int, store: str, folder: str) -> None:
    """Compute the loss of one rank's half of 370 columns padded to 512, so that the two ranks hold unequal numbers."""
    device = torch.device("cpu") if INTERPRETED else torch.device("cuda", rank)
    if not INTERPRETED:
        torch.cuda.set_device(device)  # NCCL's, of its own streams and buffers
    dist.init_process_group(
        "gloo" if INTERPRETED else "nccl",
        init_method=f"file://{store}",
        rank=rank,
        world_size=2,
        timeout=timedelta(minutes=5),
    )
    vocab = VocabShard.from_group(512, 370, dist.group.WORLD)
    student, teacher, tokens = padded_logits()
    columns = slice(vocab.start, vocab.start + vocab.size)
    outcomes = []
    for kind in DIVERGENCES.values():
        leaf = student[:, columns].to(device).requires_grad_()
        arguments = {"target": Target(), "divergence": kind, "vocab": vocab, "backend": "triton"}
        stats = distillation_loss(leaf, teacher[:, columns].to(device), tokens.to(device), **arguments)
        stats.loss.sum().backward()
        assert leaf.grad is not None
        values = [getattr(stats, field.name).detach().cpu().tolist() for field in fields(TokenStats)]
        outcomes.append((values, leaf.grad.cpu().tolist()))
    torch.save(outcomes, f"{folder}/rank{rank}.pt")
    dist.destroy_process_group()


def padded_logits() -> tuple[Tensor, Tensor, Tensor]:
    student, teacher, tokens = (tensor.cpu() for tensor in logits(7, 512, seed=9))
    return student, teacher, tokens % 370


@full
@pytest.mark.skipif(not INTERPRETED and torch.cuda.device_count() < 2, reason="needs two GPUs")
def test_two_tensor_parallel_ranks_equal_one_and_have_the_same_bits(tmp_path) -> None:
    arguments = str(tmp_path / "store"), str(tmp_path)
    context = mp.start_processes(rank_of_two, arguments, nprocs=2, join=False)
    wait_for(context)
    shards = [torch.load(tmp_path / f"rank{rank}.pt") for rank in (0, 1)]
    student, teacher, tokens = (tensor.to(DEVICE) for tensor in padded_logits())
    for i, kind in enumerate(DIVERGENCES.values()):
        (first, left), (second, right) = (shards[rank][i] for rank in (0, 1))
        assert str(first) == str(second)  # as text: NaN equals NaN
        leaf = student.clone().requires_grad_()
        vocab = VocabShard(0, 512, 370)
        arguments = {"target": Target(), "divergence": kind, "vocab": vocab, "backend": "triton"}
        stats = distillation_loss(leaf, teacher, tokens, **arguments)
        stats.loss.sum().backward()
        for field, values in zip(fields(TokenStats), first, strict=True):
            whole = getattr(stats, field.name).detach().cpu().double()
            torch.testing.assert_close(torch.tensor(values).double(), whole, rtol=5e-6, atol=5e-6)
        joined = torch.cat([torch.tensor(left), torch.tensor(right)], 1)
        torch.testing.assert_close(joined, leaf.grad.cpu(), rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("parts", after(1, [1, 3]), indirect=True)
def test_of_equal_maxima_also_in_several_parts_the_lowest_column_counts(parts: int) -> None:
    student, teacher, tokens = (values[:2].clone() for values in logits(7, 600))
    student[:, [7, 590]] = 100.0
    teacher[0, 7] = teacher[1, 590] = 100.0
    stats, _ = run(student, teacher, tokens, Target(), Divergence())
    assert stats.top1_agreement.tolist() == [True, False]


@full
@pytest.mark.parametrize("mode", FUSED_MODES)
def test_the_fused_output_layer_runs_on_the_kernels(mode: str) -> None:
    generator = torch.Generator().manual_seed(3)
    states = [torch.randn(7, 8, generator=generator).to(DEVICE) for _ in range(2)]
    weight, tokens = torch.randn(300, 8, generator=generator).to(DEVICE), torch.arange(7, device=DEVICE)
    found = []
    for backend in ("torch", "triton"):
        leaves = states[0].clone().requires_grad_(), weight.clone().requires_grad_()
        stats = fused_distillation_loss(
            leaves[0],
            states[1],
            leaves[1],
            None,
            tokens,
            target=Target(),
            divergence=Divergence(),
            vocab=VocabShard(0, 300, 290),
            chunk_tokens=3,
            mode=mode,
            backend=backend,
        )
        gradients = torch.autograd.grad((stats.loss * torch.linspace(-1, 2, 7, device=DEVICE)).sum(), leaves)
        found.append((replace(stats, loss=stats.loss.detach()), gradients))
    (expected, expected_gradients), (got, gradients) = found
    assert_same(got, expected)
    for mine, theirs in zip(gradients, expected_gradients, strict=True):
        assert (mine - theirs).abs().max() <= 1e-5 * theirs.abs().max()


LAUNCHES = {
    ("reverse", "capped"): ["first_pass", "solve", "second_pass", "finish", "second_pass", "finish", "gradient"],
    ("reverse", "fixed"): ["first_pass", "solve", "second_pass", "finish", "gradient"],
    ("jsd", "capped"): [
        *("first_pass", "solve", "second_pass", "finish", "second_pass", "finish"),
        *("jsd_pass", "gradient"),
    ],
}


@full
@pytest.mark.skipif(not INTERPRETED, reason="counts what the interpreter loads and stores")
@pytest.mark.parametrize(("kind", "reads"), [("forward", 3), ("jsd", 4)])
def test_every_logit_is_read_once_per_pass_and_written_once(
    kind: str, reads: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Allow further reads of some logits: a part's largest columns and the response token's."""
    student, teacher, tokens = (values[:1] for values in logits(8, 2100))
    student, teacher = student.bfloat16(), teacher.bfloat16()
    loaded, stored = counted_accesses(monkeypatch, student), counted_accesses(monkeypatch, student, "store")
    loaded_of_teacher = counted_accesses(monkeypatch, teacher)
    run_in_place(student, teacher, tokens, DIVERGENCES[kind])
    assert (stored == 1).all()
    for counts in (loaded, loaded_of_teacher):
        assert counts.min() == reads and (counts > reads).sum() <= 30


@full
@pytest.mark.skipif(not INTERPRETED, reason="counts what the interpreter loads and stores")
def test_only_a_row_that_two_passes_do_not_match_is_read_by_the_third(monkeypatch: pytest.MonkeyPatch) -> None:
    student, teacher, tokens = (values[:2] for values in plateaus.needing_the_third_pass())
    student, teacher = student.bfloat16(), teacher.bfloat16()
    for row, reads in ((0, 4), (1, 3)):
        with monkeypatch.context() as patch:
            counts = counted_accesses(patch, teacher)
            run_in_place(student.clone(), teacher, tokens, DIVERGENCES["reverse"])
        words = counts.view(2, -1)[row]
        assert words.min() == reads and (words > reads).sum() <= 30


def counted_accesses(monkeypatch: pytest.MonkeyPatch, logits: Tensor, what: str = "load") -> Tensor:
    """Return how often each 2 bytes of these logits will be loaded or stored by the interpreter."""
    from triton.runtime.interpreter import interpreter_builder

    counts = torch.zeros(logits.numel(), dtype=torch.int64)
    access = getattr(interpreter_builder, f"create_masked_{what}")

    def counted(pointers: Any, *arguments: Any) -> Any:
        mask = arguments[0] if what == "load" else arguments[1]
        places = torch.from_numpy(pointers.data[mask.data].astype("int64")) - logits.data_ptr()
        width = pointers.get_element_ty().primitive_bitwidth // 16
        for i in range(width):
            column = (places // 2 + i)[(places >= 0) & (places < logits.nbytes)]
            counts.index_add_(0, column, torch.ones_like(column))
        return access(pointers, *arguments)

    monkeypatch.setattr(interpreter_builder, f"create_masked_{what}", counted)
    return counts


@full
def test_rows_beyond_2_to_the_31_logits_are_those_that_are_read_and_written() -> None:
    """Row 2 begins beyond 2^31 logits.  On a CPU only the pages that are written exist."""
    stride, num_columns = 2**30 + 64, 300
    places = torch.empty(2 * stride + 3 * 320, dtype=torch.bfloat16, device=DEVICE)
    far = [places.as_strided((3, num_columns), (stride, 1), 320 * i) for i in range(3)]
    near = [values[:3, :num_columns].bfloat16() for values in logits(8, 304)[:2]]
    near.append(torch.zeros_like(near[0]))
    grid, results = BetaGrid.of(Target(), torch.float32), []
    tokens = torch.tensor([0, 150, 299], device=DEVICE)
    for ours, theirs in zip(far, near, strict=True):
        ours.copy_(theirs)
    for student, teacher, out in (far, near):
        shard = Shard(student, teacher, grid.mix_weights, torch.float32)
        sums, argmax = pass_launches.first_pass(shard, grid, tokens, 0)
        solver_state = solver_launches.solve_tokens(sums, grid)
        second = pass_launches.second_pass(shard, solver_state.constants, argmax, forward_kl=False)
        jsd = pass_launches.jsd_pass(shard, solver_state.constants, 0.3)
        weights = torch.ones(3, device=DEVICE)
        pass_launches.write_gradient(shard, solver_state.constants, jsd[0, :, 1], DIVERGENCES["jsd"], weights, out)
        results.append((sums, argmax, second, jsd, out))
    for ours, theirs in zip(*results, strict=True):
        assert torch.equal(ours, theirs)


def test_kernels_are_launched_on_the_gpu_where_the_logits_lie(monkeypatch: pytest.MonkeyPatch) -> None:
    entered: list[torch.device] = []

    def check() -> None:
        assert [device.type for device in entered] == [DEVICE.type]

    @contextmanager
    def launching_on(tensor: Tensor) -> Iterator[None]:
        entered.append(tensor.device)
        yield
        entered.pop()

    for module in (pass_launches, solver_launches):
        monkeypatch.setattr(module, "launching_on", launching_on)
    launches = counted_launches(monkeypatch, check)
    for kind, rule in LAUNCHES:
        student, teacher, tokens = (values[:1] for values in logits(8, 40))
        run(student, teacher, tokens, TARGETS[rule], DIVERGENCES[kind])
    assert set(launches) == set(KERNELS)


@pytest.mark.skipif(INTERPRETED or torch.cuda.device_count() < 2, reason="needs two GPUs")
def test_logits_on_another_gpu_than_the_current_one_have_a_loss() -> None:
    arguments = logits(8, 333)
    here, _ = run(*arguments, Target(), Divergence())
    assert torch.cuda.current_device() == 0
    elsewhere = [values.to("cuda:1") for values in arguments]
    leaf = elsewhere[0].requires_grad_()
    vocab = VocabShard(0, 333, 333)
    stats = distillation_loss(leaf, *elsewhere[1:], target=Target(), divergence=Divergence(), vocab=vocab)
    stats.loss.sum().backward()
    assert leaf.grad is not None and torch.equal(stats.loss.cpu(), here.loss.cpu())


@full
@pytest.mark.parametrize(("kind", "rule"), LAUNCHES)
def test_as_shipped_a_loss_takes_5_to_8_launches_and_no_memory_but_a_few_numbers_per_token(
    kind: str, rule: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Run with ``LANES``, ``PART_COLUMNS`` and ``MOST_PARTS`` unchanged: on the GPU rows in 8 parts and in 64."""
    monkeypatch.undo()
    for num_rows, num_columns, num_parts in ((2, 4208, 2),) if INTERPRETED else ((512, 19008, 8), (8, 152064, 64)):
        student, teacher, tokens = (values[:num_rows] for values in logits(max(8, num_rows), num_columns))
        student, teacher = student.bfloat16(), teacher.bfloat16()
        assert pass_launches.num_parts(num_rows, num_columns) == num_parts
        loss, expected = reference(student, teacher, TARGETS[rule], DIVERGENCES[kind])
        launches = counted_launches(monkeypatch)
        (stats, gradient), peak = with_peak_bytes(student, teacher, tokens, DIVERGENCES[kind], TARGETS[rule])
        assert launches == [f"{name}_kernel" for name in LAUNCHES[kind, rule]]
        # a part's sums, at most 14 + 4 * 9 of them and twice, and some of float64
        assert peak < min(student.nbytes / 2, num_rows * (1024 * num_parts + 512) + 64 * 1024)
        torch.testing.assert_close(stats.loss.double(), loss, rtol=1e-5, atol=1e-5)
        digits = 2 * torch.finfo(torch.bfloat16).eps
        torch.testing.assert_close(gradient.double(), expected, rtol=digits, atol=1e-6)
        monkeypatch.undo()


def with_peak_bytes(*arguments: Any) -> tuple[tuple[TokenStats, Tensor], float]:
    """Return the result of `run_in_place`, and the most bytes that it took at once beyond its arguments."""
    if INTERPRETED:
        with BytesAlive(arguments[:3]) as alive:
            return run_in_place(*arguments), alive.peak
    torch.cuda.synchronize()
    before = torch.cuda.memory_allocated()
    torch.cuda.reset_peak_memory_stats()
    result = run_in_place(*arguments)
    return result, torch.cuda.max_memory_allocated() - before


def run_in_place(
    student: Tensor, teacher: Tensor, tokens: Tensor, kind: Divergence, target: Target | None = None
) -> tuple[TokenStats, Tensor]:
    """Do what `run` does, with the gradient written over the logits."""
    leaf = student.requires_grad_()
    seen: list[Tensor] = []
    product = leaf.view_as(leaf)
    product.register_hook(seen.append)
    vocab = VocabShard(0, student.shape[1], student.shape[1])
    arguments = {"target": target or Target(), "divergence": kind, "vocab": vocab, "backend": "triton"}
    stats = distillation_loss(product, teacher, tokens, **arguments, inplace_backward=True)
    (stats.loss * torch.linspace(-1, 2, len(tokens), device=DEVICE)).sum().backward()
    assert seen[0].data_ptr() == leaf.data_ptr()
    return replace(stats, loss=stats.loss.detach()), seen[0]


KERNELS: dict[str, ModuleType] = {
    **dict.fromkeys(("first_pass_kernel", "second_pass_kernel", "jsd_pass_kernel", "gradient_kernel"), pass_launches),
    **dict.fromkeys(("solve_kernel", "finish_kernel"), solver_launches),
}


class Counted:
    """A kernel that reports its launches."""

    def __init__(self, kernel: Any, report: Callable[[], None]) -> None:
        self.kernel, self.report = kernel, report

    def __getitem__(self, programs: tuple[int, ...]) -> Callable[..., Any]:
        self.report()
        return self.kernel[programs]


def counted_launches(monkeypatch: pytest.MonkeyPatch, check: Callable[[], Any] = lambda: None) -> list[str]:
    """Return a list that will hold the kernels' names in the order of their launches.

    ``check`` is called before each launch.
    """
    launches: list[str] = []

    def report(name: str) -> None:
        check()
        launches.append(name)

    for name, module in KERNELS.items():
        monkeypatch.setattr(module, name, Counted(getattr(module, name), partial(report, name)))
    return launches
