# Copyright (c) 2026 the megatron_selfdistill authors. Apache-2.0.
"""The claims about the Triton kernels of the contrast with controls; see kernel_claims.py."""

from __future__ import annotations

import math

import pytest
import torch
from kernel_cases import DEVICE, cases
from torch import Tensor

from megatron_selfdistill.kernels import contrast_kernels, triton_backend
from megatron_selfdistill.loss import Divergence, Target, VocabShard
from megatron_selfdistill.loss.sharded import contrast as twin
from megatron_selfdistill.loss.sharded.fused_linear import fused_distillation_loss

pytestmark = pytest.mark.filterwarnings("ignore:.*encountered in:RuntimeWarning")
ROUNDING = 2.0**-23


def logits(*shape: int, dtype: torch.dtype) -> Tensor:
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
    controls, teacher = logits(3, 5, num_columns, dtype=dtype), logits(5, num_columns, dtype=dtype)
    num_valid = max(1, num_columns - 2)
    sums, expected = (one.row_log_sums(controls, num_valid) for one in (contrast_kernels, twin))
    torch.testing.assert_close(sums, expected, rtol=4 * ROUNDING, atol=4 * ROUNDING * math.log(num_columns + 2))
    found, difference = (one.contrast(teacher, controls, expected) for one in (contrast_kernels, twin))
    torch.testing.assert_close(found, difference, rtol=8 * ROUNDING, atol=64 * ROUNDING)


def test_a_row_with_nan_gives_nan_and_no_other_row_changes() -> None:
    controls, teacher = logits(2, 5, 40, dtype=torch.float32), logits(5, 40, dtype=torch.float32)
    before = contrast_kernels.row_log_sums(controls, 40)
    controls[1, 3, 7] = math.nan
    sums = contrast_kernels.row_log_sums(controls, 40)
    assert sums[1, 3].isnan() and torch.equal(sums.isnan().nonzero(), torch.tensor([[1, 3]], device=DEVICE))
    assert torch.equal(sums[0], before[0])
    assert contrast_kernels.contrast(teacher, controls, sums).isnan().any(1).tolist() == [False] * 3 + [True, False]


@cases("mode", ["keep_gradient", "low_memory"], ["keep_gradient", "low_memory"], quick=1)
def test_the_fused_layer_with_controls_has_the_loss_of_the_twin(mode: str) -> None:
    generator = torch.Generator().manual_seed(4)
    shapes = (6, 8), (6, 8), (50, 8), (2, 6, 8)
    hidden, teacher, weight, controls = (torch.randn(*it, generator=generator).to(DEVICE) for it in shapes)
    found = {}
    for backend in ("torch", "triton"):
        own = hidden.clone().requires_grad_()
        stats = fused_distillation_loss(
            own,
            teacher,
            weight,
            None,
            torch.zeros(6, dtype=torch.int64, device=DEVICE),
            target=Target(anchor="student", num_controls=2),
            divergence=Divergence(),
            vocab=VocabShard(0, 50, 48),
            control_hidden=controls,
            chunk_tokens=4,
            mode=mode,
            backend=backend,
        )
        found[backend] = stats.loss.detach(), *torch.autograd.grad(stats.loss.sum(), own)
    for ours, theirs in zip(*found.values(), strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-5)
    assert triton_backend.backend().contrast is contrast_kernels.contrast


def test_a_teacher_whose_columns_do_not_lie_side_by_side_is_refused_and_not_read_wrongly() -> None:
    controls, columns = logits(2, 5, 40, dtype=torch.float32), logits(40, 5, dtype=torch.float32)
    with pytest.raises(ValueError, match="whose columns lie side by side"):
        contrast_kernels.contrast(columns.t(), controls, contrast_kernels.row_log_sums(controls, 40))
