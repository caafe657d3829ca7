# Copyright (c) 2026 the megatron_selfdistill authors. Apache-2.0.
"""The claims about what the loss's Triton kernels read, write, refuse and launch; see kernel_claims.py."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import fields
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
from kernel_cases import (
    DEVICE,
    INTERPRETED,
    assert_same,
    cases,
    cut_rows,
    full,
    logits,
    reference,
    run,
    wait_for,
)
from logit_pairs import DIVERGENCES, TARGETS
from torch import Tensor

from megatron_selfdistill.choices import FUSED_MODES
from megatron_selfdistill.kernels import pass_launches, solver_launches
from megatron_selfdistill.loss import Divergence, Target, TokenStats, VocabShard, distillation_loss
from megatron_selfdistill.loss.sharded.fused_linear import fused_distillation_loss
from megatron_selfdistill.loss.sharded.shard_sums import BetaGrid, Shard

pytestmark = pytest.mark.filterwarnings("ignore:.*encountered in:RuntimeWarning")


@pytest.fixture(autouse=True)
def parts(monkeypatch: pytest.MonkeyPatch, request: pytest.FixtureRequest) -> int:
    """Return the number of parts of a row in this test: 1, unless the test asks for more."""
    return cut_rows(monkeypatch, getattr(request, "param", 1))


@full
@cases("kind, parts", [("forward", 5), ("jsd", 2)], DIVERGENCES, [2, 5], quick=1)
def test_rows_cut_into_parts_equal_whole_rows(kind: str, parts: int, monkeypatch: pytest.MonkeyPatch) -> None:
    student, teacher, tokens = logits(7, 600, seed=4)
    cut = run(student, teacher, tokens, Target(anchor="student"), DIVERGENCES[kind])
    assert pass_launches.num_parts(7, 600) == parts
    monkeypatch.setattr(pass_launches, "MOST_PARTS", 1)
    whole = run(student, teacher, tokens, Target(anchor="student"), DIVERGENCES[kind])
    assert_same(cut[0], whole[0])
    torch.testing.assert_close(cut[1], whole[1], rtol=1e-5, atol=1e-6)


@full
@cases("kind", ["jsd"], DIVERGENCES, quick=1)
def test_strided_rows_and_backward_in_place_give_the_same_bits(kind: str) -> None:
    student, teacher, tokens = logits(8, 333)
    target, divergence = Target(anchor="student"), DIVERGENCES[kind]
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


def test_what_the_kernels_cannot_read_is_refused_with_a_message() -> None:
    student, teacher, tokens = logits(8, 64)
    with pytest.raises(ValueError, match=r"whose columns lie side by side; got strides \(1, 8\)"):
        run(student.t().contiguous().t(), teacher, tokens, Target(anchor="student"), Divergence())
    with pytest.raises(ValueError, match="take bfloat16, float16 and float32, and the logits are float64"):
        run(student.double(), teacher, tokens, Target(anchor="student"), Divergence())


def test_no_rows_and_rows_of_one_column_have_no_loss() -> None:
    for num_rows, num_columns in ((0, 50), (2, 1)):
        student, teacher = (torch.randn(num_rows, num_columns, device=DEVICE) for _ in range(2))
        tokens = torch.zeros(num_rows, dtype=torch.int64, device=DEVICE)
        for kind in DIVERGENCES.values():
            stats, gradient = run(student, teacher, tokens, Target(anchor="student"), kind)
            assert (stats.loss == 0).all() and (gradient == 0).all() and gradient.shape == student.shape


def rank_of_two(rank: int, store: str, directory: str) -> None:
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
        arguments = {"target": Target(anchor="student"), "divergence": kind, "vocab": vocab, "backend": "triton"}
        stats = distillation_loss(leaf, teacher[:, columns].to(device), tokens.to(device), **arguments)
        stats.loss.sum().backward()
        assert leaf.grad is not None
        values = [getattr(stats, field.name).detach().cpu().tolist() for field in fields(TokenStats)]
        outcomes.append((values, leaf.grad.cpu().tolist()))
    torch.save(outcomes, f"{directory}/rank{rank}.pt")
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
        arguments = {"target": Target(anchor="student"), "divergence": kind, "vocab": vocab, "backend": "triton"}
        stats = distillation_loss(leaf, teacher, tokens, **arguments)
        stats.loss.sum().backward()
        for field, values in zip(fields(TokenStats), first, strict=True):
            whole = getattr(stats, field.name).detach().cpu().double()
            torch.testing.assert_close(torch.tensor(values).double(), whole, rtol=5e-6, atol=5e-6)
        joined = torch.cat([torch.tensor(left), torch.tensor(right)], 1)
        torch.testing.assert_close(joined, leaf.grad.cpu(), rtol=1e-5, atol=1e-6)


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
            target=Target(anchor="student"),
            divergence=Divergence(),
            vocab=VocabShard(0, 300, 290),
            chunk_tokens=3,
            mode=mode,
            backend=backend,
        )
        gradients = torch.autograd.grad((stats.loss * torch.linspace(-1, 2, 7, device=DEVICE)).sum(), leaves)
        found.append((stats.detached(), gradients))
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


@pytest.mark.skipif(INTERPRETED or torch.cuda.device_count() < 2, reason="needs two GPUs")
def test_logits_on_another_gpu_than_the_current_one_have_a_loss() -> None:
    arguments = logits(8, 333)
    here, _ = run(*arguments, Target(anchor="student"), Divergence())
    assert torch.cuda.current_device() == 0
    elsewhere = [values.to("cuda:1") for values in arguments]
    leaf = elsewhere[0].requires_grad_()
    vocab = VocabShard(0, 333, 333)
    stats = distillation_loss(
        leaf, *elsewhere[1:], target=Target(anchor="student"), divergence=Divergence(), vocab=vocab
    )
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
