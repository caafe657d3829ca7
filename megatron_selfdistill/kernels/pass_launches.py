# Copyright (c) 2026 the megatron_selfdistill authors. Apache-2.0.
"""The passes over one vocabulary shard as Triton kernels, one read per row and pass.

Twin: `sharded/shard_sums.py`.
The functions here have the contracts of the twin and launch the kernels of pass_kernels.py.
The first pass, the second pass and the pass of the JSD run one program of one warp per row and part of a row, and each
lane keeps sums of its own; the gradient is elementwise.  There are no atomics and no autotuning: the same input gives
the same bits.
"""

from __future__ import annotations

import ctypes
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
import triton
from torch import Tensor

from megatron_selfdistill.choices import DIVERGENCES
from megatron_selfdistill.kernels.pass_kernels import (
    BOTH,
    RENYI,
    STUDENT_ONLY,
    TEACHER_ONLY,
    first_pass_kernel,
    gradient_kernel,
    jsd_pass_kernel,
    renyi_pass_kernel,
    second_pass_kernel,
)
from megatron_selfdistill.loss.sharded.shard_sums import (
    FIRST_PASS,
    SECOND_PASS,
    SECOND_PASS_FORWARD,
    BetaGrid,
    LogProbGradient,
    Shard,
    TokenConstants,
)
from megatron_selfdistill.loss.target import Divergence

LANES = 32
"""The threads of a program that sums: one warp, so that nothing waits at a barrier.

A multiprocessor holds at most 32 such programs, fewer where the sums take more than 64 registers of a thread; each
program has two loads under way while it sums (see pass_kernels.py)."""
LOAD_BYTES = 16
"""The bytes per thread and load: the widest load there is, 8 columns of bfloat16."""
GRADIENT_BLOCK, GRADIENT_WARPS = 2048, 4
"""The columns and warps of a program of the gradient: in bfloat16, two loads of 16 bytes per row and thread are under
way."""
PROGRAMS = 4096
"""The number of programs that a launch should have: rows are cut into parts until there are about so many.

It is 32 on each of an H100's 132 multiprocessors.  It is one number for every GPU: parts are summed apart, so another
number would give other bits."""
PART_COLUMNS = 2048
"""The smallest number of columns of a part; below it, the start of a part and its 27 and more sums cost more than its
reading."""
MOST_PARTS = 64
"""The largest number of parts of a row."""
# a * b + c as one instruction, for speed; results depend on it by rounding only.
COMPILED = {"num_stages": 1, "enable_fp_fusion": True}
ALL_REGISTERS = {"maxnreg": 255}
"""The option that lets a thread use all registers: by itself, ptxas spills numbers of large kernels to fit one more
warp on a multiprocessor."""


def num_parts(num_rows: int, num_columns: int) -> int:
    """Return the number of parts into which rows of [num_rows, columns per rank] are cut."""
    wanted: int = triton.cdiv(PROGRAMS, max(1, num_rows))
    return max(1, min(wanted, num_columns // PART_COLUMNS, MOST_PARTS))


def first_pass(shard: Shard, grid: BetaGrid, response_tokens: Tensor | None, start: int) -> tuple[Tensor, Tensor]:
    """Launch the kernel of `shard_sums.first_pass`; the argmax is int32."""
    num_rows, parts = shard.student.shape[0], shard.num_parts
    sums = _new(shard, len(FIRST_PASS) + grid.num_sums)
    argmaxes = torch.empty(parts, num_rows, dtype=torch.int32, device=shard.student.device)
    options = first_pass_options(grid, _columns_per_load(shard))
    if num_rows:
        with launching_on(shard.student):
            first_pass_kernel[(num_rows, parts)](
                shard.student,
                shard.teacher,
                argmaxes if response_tokens is None else response_tokens.contiguous(),
                grid.on(shard.student.device),
                sums,
                argmaxes,
                *_extent(shard, options["VEC"]),
                start,
                as_sum(shard.mix_weights[0]),
                MIX=mix_of(shard.mix_weights),
                J=len(grid.betas),
                DOUBLED=sum(1 << j for j in grid.doubled),
                HAS_TOKENS=response_tokens is not None,
                PACKED=is_packed(shard),
                **options,
            )
    return sums, argmaxes


def second_pass(
    shard: Shard, constants: TokenConstants, mix_argmax: Tensor, *, forward_kl: bool, status: Tensor | None = None
) -> Tensor:
    """Launch the kernel of `shard_sums.second_pass`.

    With ``status``, the programs of tokens that have converged read nothing.
    """
    sums = _new(shard, len(SECOND_PASS_FORWARD if forward_kl else SECOND_PASS))
    if sums.shape[1]:
        with launching_on(shard.student):
            second_pass_kernel[(sums.shape[1], shard.num_parts)](
                shard.student,
                shard.teacher,
                *constants.tensors(),
                mix_argmax,
                mix_argmax if status is None else status,
                sums,
                *_extent(shard, _columns_per_load(shard)),
                as_sum(shard.mix_weights[0]),
                MIX=mix_of(shard.mix_weights),
                WITH_FORWARD=forward_kl,
                SOME_ROWS=status is not None,
                **_summing(shard),
            )
    return sums


def jsd_pass(shard: Shard, constants: TokenConstants, jsd_lambda: float) -> Tensor:
    """Launch the kernel of `jsd_and_renyi_passes.jsd_pass`."""
    return _two_sums(jsd_pass_kernel, shard, constants, jsd_lambda)


def renyi_pass(shard: Shard, constants: TokenConstants, divergence: Divergence) -> Tensor:
    """Launch the kernel of `jsd_and_renyi_passes.renyi_pass`."""
    is_forward = divergence.kind == "forward_kl"
    return _two_sums(renyi_pass_kernel, shard, constants, 1 - divergence.order, FORWARD=is_forward)


def _two_sums(kernel: Any, shard: Shard, constants: TokenConstants, number: float, **options: bool) -> Tensor:
    """Launch the kernel of a pass that one kind of divergence makes alone; return its sums [num_parts, T, 2]."""
    sums = _new(shard, 2)
    if sums.shape[1]:
        with launching_on(shard.student):
            kernel[(sums.shape[1], shard.num_parts)](
                shard.student,
                shard.teacher,
                *constants.tensors(),
                sums,
                *_extent(shard, _columns_per_load(shard)),
                as_sum(shard.mix_weights[0]),
                as_sum(number),
                MIX=mix_of(shard.mix_weights),
                **options,
                **_summing(shard),
            )
    return sums


def write_gradient(
    shard: Shard,
    constants: TokenConstants,
    kl_value: Tensor,
    divergence: Divergence,
    grad_loss: Tensor,
    out: Tensor,
    log_prob: LogProbGradient | None = None,
    forward_shares: Tensor | None = None,
) -> None:
    """Launch the kernel of `shard_sums.write_gradient`."""
    num_rows, num_columns = shard.student.shape
    unread = kl_value, kl_value
    if num_rows and num_columns:
        with launching_on(shard.student):
            gradient_kernel[(num_rows, triton.cdiv(num_columns, GRADIENT_BLOCK))](
                shard.student,
                shard.teacher,
                *constants.tensors(),
                kl_value,
                grad_loss,
                *(unread if log_prob is None else (operand.contiguous() for operand in log_prob)),
                kl_value if forward_shares is None else forward_shares.contiguous(),
                out,
                row_stride(shard.student),
                row_stride(shard.teacher),
                row_stride(out),
                kl_value.stride(0),
                grad_loss.stride(0),
                num_columns,
                as_sum(shard.mix_weights[0]),
                as_sum(divergence.jsd_lambda),
                as_sum(1 - divergence.student_power),
                as_sum(1 - divergence.order),
                as_sum(divergence.student_power / (divergence.order - 1) if divergence.is_renyi else 0.0),
                MIX=mix_of(shard.mix_weights),
                KIND=RENYI if divergence.is_renyi else DIVERGENCES.index(divergence.kind),
                WITH_LOG_PROB=log_prob is not None,
                WITH_FORWARD=forward_shares is not None,
                BLOCK=GRADIENT_BLOCK,
                num_warps=GRADIENT_WARPS,
                **COMPILED,
            )


def launching_on(tensor: Tensor) -> AbstractContextManager[None]:
    """Return a context in which Triton launches on the tensor's GPU, and not on the current one."""
    return torch.cuda.device(tensor.device) if tensor.is_cuda else nullcontext()


def _new(shard: Shard, num_columns: int) -> Tensor:
    """Return an empty tensor [num_parts, T, num_columns] for the sums of a pass."""
    shape = shard.num_parts, shard.student.shape[0], num_columns
    return torch.empty(shape, dtype=torch.float32, device=shard.student.device)


def first_pass_options(grid: BetaGrid, columns_per_load: int) -> dict[str, int]:
    """Return the options of the first pass's kernel, whose sums take most registers where the grid is large."""
    options = {"LANES": LANES, "VEC": columns_per_load, "num_warps": 1, **COMPILED}
    return options | ALL_REGISTERS if len(grid.betas) > 5 else options


def _extent(shard: Shard, columns_per_load: int) -> tuple[int, int, int, int, int]:
    """Return both row strides, the number of rows, the number of columns, and the number of blocks of a part."""
    num_rows, num_columns = shard.student.shape
    blocks = triton.cdiv(num_columns, LANES * columns_per_load)
    strides = row_stride(shard.student), row_stride(shard.teacher)
    return *strides, num_rows, num_columns, triton.cdiv(blocks, shard.num_parts)


def _columns_per_load(shard: Shard) -> int:
    """Return the number of columns that a thread reads of each row at once."""
    return LOAD_BYTES // max(shard.student.itemsize, shard.teacher.itemsize)


def _summing(shard: Shard) -> dict[str, int | bool]:
    """Return the options of the other kernels that sum."""
    options = {"LANES": LANES, "VEC": _columns_per_load(shard), "PACKED": is_packed(shard)}
    return {**options, "num_warps": 1, **COMPILED}


def is_packed(shard: Shard) -> bool:
    """Return whether rows may be read 16 bytes at a time.

    Triton knows of a pointer or a stride only whether it is a multiple of 16.  A stride of 8 columns of bfloat16 is
    also 16 bytes, but Triton would not know it.
    """
    return all(x.data_ptr() % LOAD_BYTES == 0 and x.stride(0) % 16 == 0 for x in (shard.student, shard.teacher))


def row_stride(logits: Tensor) -> int:
    """Return the distance of two rows in memory, in columns.

    Raises: ValueError if the columns of a row do not lie side by side.
    """
    if logits.shape[1] > 1 and logits.stride(1) != 1:
        raise ValueError(
            "the Triton kernels of the loss need logits [T, columns] whose columns lie side by side; got strides "
            f"{logits.stride()}. Make them contiguous, or set loss.backend=torch."
        )
    return logits.stride(0)


def as_sum(value: float) -> float:
    """Round a value to float32, as Triton rounds a kernel's argument; the interpreter would keep it in float64."""
    return ctypes.c_float(value).value


def mix_of(mix_weights: tuple[float, float]) -> int:
    """Return BOTH, STUDENT_ONLY or TEACHER_ONLY for ``Target.mix_weights``."""
    teacher_weight, student_weight = mix_weights
    if student_weight == 0:
        return TEACHER_ONLY
    return STUDENT_ONLY if teacher_weight == 0 else BOTH
