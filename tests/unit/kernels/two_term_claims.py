# Copyright (c) 2026 the megatron_selfdistill authors. Apache-2.0.
"""The claims about the gradient of the log-probs that the Triton kernels write; see kernel_claims.py."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from kernel_cases import DEVICE, cases, cut_rows, full, logits
from torch import Tensor
from two_terms import DIVERGENCES, TARGETS, as_teacher, coefficients, token_losses

from megatron_selfdistill.kernels import pass_launches
from megatron_selfdistill.loss import Divergence, Target, TokenStats, VocabShard, distillation_loss
from megatron_selfdistill.loss.sharded import shard_sums
from megatron_selfdistill.loss.sharded.fused_linear import fused_distillation_loss
from megatron_selfdistill.loss.sharded.shard_sums import LogProbGradient, Shard, TokenConstants
from megatron_selfdistill.loss.weighting import Coefficients

pytestmark = pytest.mark.filterwarnings("ignore:.*encountered in:RuntimeWarning")
NUM_VALID, NUM_COLUMNS = 2100, 2176  # two blocks of the kernel, the second with padding
TOKENS = [0, 2047, 2048, 2099, 1500, 2098, 3, 1000]


@pytest.fixture(autouse=True)
def parts(monkeypatch: pytest.MonkeyPatch) -> int:
    """Return the number of parts of a row: 1."""
    return cut_rows(monkeypatch, 1)


def on_device(*tensors: Tensor) -> tuple[Tensor, ...]:
    """Return the tensors on DEVICE."""
    return tuple(tensor.to(DEVICE) for tensor in tensors)


@full
@cases(
    "rule, kind",
    [("capped", "reverse"), ("teacher alone", "forward"), ("with a reference", "jsd"), ("matched", "forward")],
    TARGETS,
    DIVERGENCES,
    quick=1,
)
def test_the_gradient_of_two_terms_equals_float64(rule: str, kind: str) -> None:
    target = TARGETS[rule]
    (student, teacher, _), (reference, *_) = logits(8, NUM_COLUMNS), logits(8, NUM_COLUMNS, seed=7)
    w, a, tokens = on_device(*coefficients(8, torch.float32), torch.tensor(TOKENS))
    valid = [rows[:, :NUM_VALID].double() for rows in (teacher, reference)]
    of_target, reference_entropy = as_teacher(target, *valid)
    mixed = teacher.clone()
    mixed[:, :NUM_VALID] = of_target.float()
    found = []
    for inplace in (False, True):
        leaf = student.clone().requires_grad_()
        product = leaf * 1
        product.register_hook(found.append)
        stats = distillation_loss(
            product,
            mixed,
            tokens,
            target=target,
            divergence=DIVERGENCES[kind],
            vocab=VocabShard(0, NUM_COLUMNS, NUM_VALID),
            reference_entropy=None if reference_entropy is None else reference_entropy.float(),
            inplace_backward=inplace,
            backend="triton",
        )
        Coefficients(w, a).token_losses(stats.loss, stats.student_log_prob).sum().backward()
    exact = student[:, :NUM_VALID].double().requires_grad_()
    token_losses(exact, *valid, tokens, target, DIVERGENCES[kind], w, a).sum().backward()
    assert torch.equal(*found)
    assert exact.grad is not None
    torch.testing.assert_close(found[0][:, :NUM_VALID].double(), exact.grad, rtol=2e-4, atol=1e-5)
    assert (found[0][:, NUM_VALID:] == 0).all()


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
    student, teacher, _ = logits(8, 300)
    student, teacher = student.to(dtype), teacher.to(dtype)
    columns = torch.tensor([-1, -300, 0, 299, 300, 2047, 2048, 170], device=DEVICE)
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


def test_without_a_use_of_the_log_probs_the_kernel_is_launched_without_the_second_term(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    switches: list[bool] = []
    kernel = pass_launches.gradient_kernel

    class Recorded:
        def __getitem__(self, programs: tuple[int, ...]) -> Callable[..., Any]:
            def launch(*arguments: Any, **options: Any) -> Any:
                switches.append(options["WITH_LOG_PROB"])
                return kernel[programs](*arguments, **options)

            return launch

    monkeypatch.setattr(pass_launches, "gradient_kernel", Recorded())
    student, teacher, tokens = logits(8, 40)
    uses: list[Callable[[TokenStats], Tensor]] = [lambda stats: stats.loss, lambda stats: stats.student_log_prob]
    for use in uses:
        leaf = student.clone().requires_grad_()
        arguments = {"target": Target(anchor="student"), "divergence": Divergence(), "vocab": VocabShard(0, 40, 40)}
        use(distillation_loss(leaf, teacher, tokens, **arguments, backend="triton")).sum().backward()
    assert switches == [False, True]
    expected = -student.double().softmax(-1)
    expected[torch.arange(8), tokens] += 1
    assert leaf.grad is not None
    torch.testing.assert_close(leaf.grad.double(), expected, rtol=1e-5, atol=1e-6)


@full
@pytest.mark.parametrize("kind", DIVERGENCES)
def test_the_fused_layer_in_low_memory_has_both_terms_on_the_kernels(kind: str) -> None:
    generator = torch.Generator().manual_seed(3)
    hidden, of_teacher = (torch.randn(7, 8, generator=generator).to(DEVICE) for _ in range(2))
    weight, tokens = torch.randn(300, 8, generator=generator).to(DEVICE), torch.arange(7, device=DEVICE) * 48
    w, a = on_device(*coefficients(7, torch.float32))
    leaves = hidden.clone().requires_grad_(), weight.clone().requires_grad_()
    stats = fused_distillation_loss(
        leaves[0],
        of_teacher,
        leaves[1],
        None,
        tokens,
        target=Target(anchor="student"),
        divergence=DIVERGENCES[kind],
        vocab=VocabShard(0, 300, 290),
        chunk_tokens=3,
        mode="low_memory",
        backend="triton",
    )
    losses = Coefficients(w, a).token_losses(stats.loss, stats.student_log_prob)
    gradients = torch.autograd.grad(losses.sum(), leaves)
    exact = hidden.double().requires_grad_(), weight[:290].double().requires_grad_()
    teacher = of_teacher.double() @ exact[1].detach().T
    arguments = teacher, teacher, tokens, Target(anchor="student"), DIVERGENCES[kind], w, a
    expected = torch.autograd.grad(token_losses(exact[0] @ exact[1].T, *arguments).sum(), exact)
    for mine, theirs in zip((gradients[0], gradients[1][:290]), expected, strict=True):
        assert (mine - theirs).abs().max() <= 2e-5 * theirs.abs().max()
