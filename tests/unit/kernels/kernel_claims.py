# Copyright (c) 2026 the megatron_selfdistill authors. Apache-2.0.
"""The claims about the Triton kernels alone: each equals its twin, and what they read, write, refuse and launch.

The laws that hold for every backend are in tests/unit/loss; kernel_cases.py says how a process has its backend.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from functools import partial
from types import ModuleType
from typing import Any

import pytest
import torch
from bytes_alive import BytesAlive
from kernel_cases import DEVICE, INTERPRETED, after, assert_same, cases, cut_rows, full, logits, reference, run
from logit_pairs import DIVERGENCES, TARGETS
from torch import Tensor

from megatron_selfdistill.choices import FUSED_MODES
from megatron_selfdistill.kernels import contrast_kernels, pass_launches, solver_launches, triton_backend
from megatron_selfdistill.loss import Divergence, Target, TokenStats, VocabShard, distillation_loss
from megatron_selfdistill.loss.sharded import contrast as contrast_twin
from megatron_selfdistill.loss.sharded import shard_sums
from megatron_selfdistill.loss.sharded.fused_linear import fused_distillation_loss
from megatron_selfdistill.loss.sharded.shard_sums import BetaGrid, LogProbGradient, Shard, TokenConstants
from megatron_selfdistill.loss.sharded.token_statistics import MergedSums
from megatron_selfdistill.loss.weighting import Coefficients

pytestmark = pytest.mark.filterwarnings("ignore:.*encountered in:RuntimeWarning")


@pytest.fixture(autouse=True)
def parts(monkeypatch: pytest.MonkeyPatch, request: pytest.FixtureRequest) -> int:
    """Return the number of parts of a row in this test: 1, unless the test asks for more."""
    return cut_rows(monkeypatch, getattr(request, "param", 1))


F32, BF16, F16 = torch.float32, torch.bfloat16, torch.float16
SHAPES = [  # columns, columns that are no padding, dtypes
    (300, 255, F32, F32),
    (1, 1, F32, F32),
    (528, 500, BF16, F32),
    (130, 129, F32, F32),
    (700, 0, F32, F32),
    (1111, 1100, BF16, BF16),
    (257, 257, F16, F16),
    (520, 500, F32, BF16),
    (1104, 1100, BF16, BF16),
    (1040, 1030, F16, BF16),
]


@pytest.mark.parametrize(("size", "num_valid", "student_dtype", "teacher_dtype"), after(2, SHAPES))
def test_the_first_pass_of_any_shape_equals_float64(
    size: int, num_valid: int, student_dtype: torch.dtype, teacher_dtype: torch.dtype
) -> None:
    student, teacher, tokens = logits(8, size)
    student, teacher = student.to(student_dtype)[:, :num_valid], teacher.to(teacher_dtype)[:, :num_valid]
    target = Target(anchor="student")
    assert_first_pass(Shard(student, teacher, target.mix_weights, torch.float32), tokens, target)


@cases(
    "rule, num_parts",
    [("strict", 3), ("strict", 1), ("strict", 8), ("fixed", 3), ("teacher alone", 3), ("no teacher", 3)],
    ["strict", "fixed", "teacher alone", "no teacher"],
    [1, 3, 8],
    quick=1,
)
def test_the_first_pass_in_parts_equals_float64(rule: str, num_parts: int) -> None:
    student, teacher, tokens = logits(8, 900, seed=2)
    shard = Shard(student, teacher, TARGETS[rule].mix_weights, torch.float32, num_parts)
    assert_first_pass(shard, tokens, TARGETS[rule])


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


def constants_of(student: Tensor, teacher: Tensor) -> TokenConstants:
    """Return constants with which q is near to the teacher's distribution; the gradient takes any normalisers."""
    tops = student.amax(1), teacher.amax(1), torch.zeros_like(student[:, 0])
    log_sums = [(x - x.amax(1, keepdim=True)).exp().sum(1).log() for x in (student, teacher)]
    return TokenConstants(*tops, log_sums[0], torch.ones_like(tops[0]), log_sums[1])


@full
@pytest.mark.parametrize("kind", DIVERGENCES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_kernel_equals_its_twin_wherever_the_response_token_lies(kind: str, dtype: torch.dtype) -> None:
    """Columns below the shard's first and beyond its last one, also within the last block, are of other shards."""
    student, teacher, _ = logits(8, 2100)
    student, teacher = student.to(dtype), teacher.to(dtype)
    columns = torch.tensor([-1, -300, 0, 2047, 2048, 2099, 2100, 170], device=DEVICE)
    incoming = torch.tensor([1.0, -2.0, 0.5, 3.0, -1.0, 2.0, 0.0, torch.nan], device=DEVICE)
    shard = Shard(student, teacher, Target("teacher_alone", anchor="student").mix_weights, torch.float32)
    grad_loss = torch.linspace(-1, 2, 8, device=DEVICE)
    constants, kl_value = constants_of(student.float(), teacher.float()), torch.full((8,), 0.3, device=DEVICE)
    found = []
    for write in (pass_launches.write_gradient, shard_sums.write_gradient):
        out = torch.zeros_like(student)
        arguments = shard, constants, kl_value, DIVERGENCES[kind], grad_loss
        write(*arguments, out, LogProbGradient(incoming, columns))
        found.append(out)
    tolerance = 1e-5 if dtype == torch.float32 else 1e-2
    torch.testing.assert_close(*found, rtol=tolerance, atol=1e-6, equal_nan=True)
    assert found[0][7].isnan().all() and not found[0][:7].isnan().any()


def rows_of_models(*shape: int, dtype: torch.dtype) -> Tensor:
    """Return logits with huge, equal and missing columns."""
    generator = torch.Generator().manual_seed(3)
    made = 4 * torch.randn(*shape, generator=generator)
    made[..., 0, :] += 1e4
    made[..., 1, :] = 2.0
    made[..., 2, ::3] = -torch.inf
    return made.to(dtype).to(DEVICE)


@pytest.mark.parametrize("num_columns", [1, 7, 2048, 5000])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_kernels_equal_their_twins(dtype: torch.dtype, num_columns: int) -> None:
    controls, teacher = rows_of_models(3, 5, num_columns, dtype=dtype), rows_of_models(5, num_columns, dtype=dtype)
    num_valid = max(1, num_columns - 2)
    sums, expected = (one.row_log_sums(controls, num_valid) for one in (contrast_kernels, contrast_twin))
    torch.testing.assert_close(sums, expected, rtol=4 * 2.0**-23, atol=4 * 2.0**-23 * math.log(num_columns + 2))
    found, difference = (one.contrast(teacher, controls, expected) for one in (contrast_kernels, contrast_twin))
    torch.testing.assert_close(found, difference, rtol=8 * 2.0**-23, atol=64 * 2.0**-23)


def test_a_row_with_nan_gives_nan_and_no_other_row_changes() -> None:
    controls, teacher = rows_of_models(2, 5, 40, dtype=torch.float32), rows_of_models(5, 40, dtype=torch.float32)
    before = contrast_kernels.row_log_sums(controls, 40)
    controls[1, 3, 7] = math.nan
    sums = contrast_kernels.row_log_sums(controls, 40)
    assert sums[1, 3].isnan() and torch.equal(sums.isnan().nonzero(), torch.tensor([[1, 3]], device=DEVICE))
    assert torch.equal(sums[0], before[0])
    assert contrast_kernels.contrast(teacher, controls, sums).isnan().any(1).tolist() == [False] * 3 + [True, False]


def test_what_the_kernels_cannot_read_is_refused_with_a_message() -> None:
    student, teacher, tokens = logits(8, 64)
    with pytest.raises(ValueError, match=r"whose columns lie side by side; got strides \(1, 8\)"):
        run(student.t().contiguous().t(), teacher, tokens, Target(anchor="student"), Divergence())
    with pytest.raises(ValueError, match="take bfloat16, float16 and float32, and the logits are float64"):
        run(student.double(), teacher, tokens, Target(anchor="student"), Divergence())
    controls, columns = rows_of_models(2, 5, 40, dtype=torch.float32), rows_of_models(40, 5, dtype=torch.float32)
    with pytest.raises(ValueError, match="whose columns lie side by side"):
        contrast_kernels.contrast(columns.t(), controls, contrast_kernels.row_log_sums(controls, 40))


@cases(
    "mode, num_controls",
    [("keep_gradient", 2), ("low_memory", 2), ("low_memory", 0), ("keep_gradient", 0)],
    FUSED_MODES,
    [0, 2],
    quick=1,
)
def test_the_fused_output_layer_runs_on_the_kernels(mode: str, num_controls: int) -> None:
    """In low memory with both terms of a loss."""
    generator = torch.Generator().manual_seed(3)
    shapes = (7, 8), (7, 8), (300, 8), (num_controls, 7, 8)
    hidden, teacher, weight, controls = (torch.randn(*shape, generator=generator).to(DEVICE) for shape in shapes)
    w, a = (torch.linspace(*ends, 7, device=DEVICE) for ends in ((0, 2), (-2, 1)))
    found = []
    for backend in ("torch", "triton"):
        leaves = hidden.clone().requires_grad_(), weight.clone().requires_grad_()
        options = {"vocab": VocabShard(0, 300, 290), "chunk_tokens": 3, "mode": mode, "backend": backend}
        options |= {"target": Target(anchor="student", num_controls=num_controls), "divergence": Divergence()}
        options |= {"control_hidden": controls if num_controls else None}
        tokens = torch.arange(7, device=DEVICE) * 48 % 290
        stats = fused_distillation_loss(leaves[0], teacher, leaves[1], None, tokens, **options)
        both = Coefficients(w, a if mode == "low_memory" else None)
        losses = both.token_losses(stats.loss, stats.student_log_prob)
        found.append((stats.detached(), torch.autograd.grad(losses.sum(), leaves)))
    (expected, expected_gradients), (got, gradients) = found
    if num_controls:  # t - c multiplies the rounding of logits
        torch.testing.assert_close(got.loss, expected.loss, rtol=1e-4, atol=1e-5)
        torch.testing.assert_close(gradients[0], expected_gradients[0], rtol=1e-4, atol=1e-5)
    else:
        assert_same(got, expected)
        for mine, theirs in zip(gradients, expected_gradients, strict=True):
            assert (mine - theirs).abs().max() <= 2e-5 * theirs.abs().max()
    assert triton_backend.backend().contrast is contrast_kernels.contrast


LAUNCHES = {
    ("reverse", "capped"): ["first_pass", "solve", "second_pass", "finish", "second_pass", "finish", "gradient"],
    ("reverse", "fixed"): ["first_pass", "solve", "second_pass", "finish", "gradient"],
    ("jsd", "capped"): "first_pass solve second_pass finish second_pass finish jsd_pass gradient".split(),
}


@full
def test_rows_beyond_2_to_the_31_logits_are_those_that_are_read_and_written() -> None:
    """Row 2 begins beyond 2^31 logits.  On a CPU only the pages that are written exist."""
    stride, num_columns = 2**30 + 64, 300
    places = torch.empty(2 * stride + 3 * 320, dtype=torch.bfloat16, device=DEVICE)
    far = [places.as_strided((3, num_columns), (stride, 1), 320 * i) for i in range(3)]
    rows = [*(values[:3, :num_columns] for values in logits(8, 304)[:2]), torch.zeros(3, num_columns, device=DEVICE)]
    near = [torch.empty_like(places[:960]).view(3, 320)[:, :num_columns].copy_(values) for values in rows]
    grid, results = BetaGrid.of(Target(anchor="student"), torch.float32), []
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
    arguments = {"target": target or Target(anchor="student"), "divergence": kind, "vocab": vocab, "backend": "triton"}
    stats = distillation_loss(product, teacher, tokens, **arguments, inplace_backward=True)
    (stats.loss * torch.linspace(-1, 2, len(tokens), device=DEVICE)).sum().backward()
    assert seen[0].data_ptr() == leaf.data_ptr()
    return stats.detached(), seen[0]


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
