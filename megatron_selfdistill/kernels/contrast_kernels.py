# Copyright (c) 2026 the megatron_selfdistill authors. Apache-2.0.
# mypy: disable-error-code="assignment, misc"
"""The contrast of the teacher with its controls as Triton kernels, which read every logit of a control once per pass.

Twin: `sharded/contrast.py`.
One program works on one row, or in the second kernel on one block of a row; there are no atomics, so that the same
input gives the same bits.
"""

from __future__ import annotations

import math

import torch
import triton
import triton.language as tl
from torch import Tensor

from megatron_selfdistill.kernels.pass_launches import COMPILED, as_sum, launching_on, row_stride

BLOCK, WARPS = 2048, 4
"""The columns and the warps of a program at a time."""


@triton.jit
def row_log_sums_kernel(logits, sums, num_columns, row_stride, BLOCK: tl.constexpr):
    """Compute `row_log_sums`: the log of the sum of exp of one row, by a running maximum."""
    row = tl.program_id(0).to(tl.int64)
    columns = tl.arange(0, BLOCK)
    highest = tl.full((), float("-inf"), tl.float32)
    total = tl.full((), 0.0, tl.float32)
    for start in range(0, num_columns, BLOCK):
        here = start + columns < num_columns
        block = tl.load(logits + row * row_stride + start + columns, mask=here, other=float("-inf")).to(tl.float32)
        above = tl.maximum(highest, tl.max(block, 0))
        shift = tl.where(above == float("-inf"), 0.0, above)
        total = total * tl.exp(highest - shift) + tl.sum(tl.exp(block - shift), 0)
        highest = above
    tl.store(sums + row, tl.where(highest == float("-inf"), highest, highest + tl.log(total)))


@triton.jit
def contrast_kernel(
    teacher,
    controls,
    normalisers,
    out,
    num_rows,
    num_columns,
    teacher_stride,
    log_number,
    num_controls,
    BLOCK: tl.constexpr,
):
    """Compute `contrast`: t - c of one block of a row, with c by a running maximum over the controls."""
    row = tl.program_id(0).to(tl.int64)
    columns = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    here = columns < num_columns
    highest = tl.full((BLOCK,), float("-inf"), tl.float32)
    total = tl.zeros((BLOCK,), tl.float32)
    for k in range(num_controls):
        place = k * num_rows + row
        logits = tl.load(controls + place * num_columns + columns, mask=here, other=0.0).to(tl.float32)
        log_probs = logits - tl.load(normalisers + place)
        above = tl.maximum(highest, log_probs)
        shift = tl.where(above == float("-inf"), 0.0, above)
        total = total * tl.exp(highest - shift) + tl.exp(log_probs - shift)
        highest = above
    control = tl.where(highest == float("-inf"), highest, highest + tl.log(total) - log_number)
    own = tl.load(teacher + row * teacher_stride + columns, mask=here, other=0.0).to(tl.float32)
    difference = tl.where(own == float("-inf"), own, own - control)
    tl.store(out + row * num_columns + columns, difference, mask=here)


def row_log_sums(logits: Tensor, num_valid: int) -> Tensor:
    """Launch the kernel of `contrast.row_log_sums`."""
    logits = logits.contiguous()
    rows, width = logits.shape[:-1], logits.shape[-1]
    sums = torch.empty(rows, dtype=torch.float32, device=logits.device)
    if sums.numel():
        with launching_on(logits):
            row_log_sums_kernel[(sums.numel(),)](
                logits, sums, num_valid, width, BLOCK=BLOCK, num_warps=WARPS, **COMPILED
            )
    return sums


def contrast(teacher_logits: Tensor, control_logits: Tensor, normalisers: Tensor) -> Tensor:
    """Launch the kernel of `contrast.contrast`."""
    num_rows, num_columns = teacher_logits.shape
    out = torch.empty(num_rows, num_columns, dtype=torch.float32, device=teacher_logits.device)
    if out.numel():
        with launching_on(teacher_logits):
            contrast_kernel[(num_rows, triton.cdiv(num_columns, BLOCK))](
                teacher_logits,
                control_logits.contiguous(),
                normalisers.contiguous(),
                out,
                num_rows,
                num_columns,
                row_stride(teacher_logits),
                as_sum(math.log(len(control_logits))),
                len(control_logits),
                BLOCK=BLOCK,
                num_warps=WARPS,
                **COMPILED,
            )
    return out
