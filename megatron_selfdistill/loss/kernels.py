# Copyright (c) 2026 the megatron_selfdistill authors. Apache-2.0.
# mypy: disable-error-code="assignment, misc"
# ruff: noqa: RUF005
"""The passes over one vocabulary shard as Triton kernels: the contracts of ``row_sums``, one read per row and pass.

The first pass, the second and that of the JSD run one program of one warp per row and part of a row, each lane
with sums of its own; the gradient is elementwise.  No atomics and no autotuning: the same input gives the same bits.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from megatron_selfdistill.loss.divergence import KINDS, Divergence
from megatron_selfdistill.loss.first_pass_kernel import BOTH, STUDENT_ONLY, TEACHER_ONLY, first_pass_kernel, load
from megatron_selfdistill.loss.grid import Grid
from megatron_selfdistill.loss.kernel_math import (
    columns_of,
    exp_minus_one,
    exponential,
    log_one_plus,
    sum_of,
    sum_of_products,
)
from megatron_selfdistill.loss.row_sums import FIRST_PASS, SECOND_PASS, SECOND_PASS_FORWARD, RowConstants, Shard

LANES = 32
"""Of a program that sums: one warp, so that nothing waits at a barrier; a multiprocessor holds 32 such programs, which
leaves each thread 64 registers, about what the sums take."""
LOAD_BYTES = 16
"""Per thread and load: the widest there is, 8 columns of bfloat16."""
GRADIENT_BLOCK, GRADIENT_WARPS = 2048, 4
"""Two loads of 16 bytes per row and thread in flight in bfloat16."""
PROGRAMS = 4096
"""Rows are cut into parts until there are about this many programs: 32 on each of an H100's 132 multiprocessors.  One
number for every GPU: parts are summed apart, so another number would be other bits."""
PART_COLUMNS = 2048
"""A part has at least so many columns; below, its start and its 27 and more sums cost more than its reading."""
MOST_PARTS = 64
# Triton contracts a * b + c today and will ask to be told; what follows counts on nothing here but speed.
COMPILED = {"num_stages": 1, "enable_fp_fusion": True}
ALL_REGISTERS = {"maxnreg": 255}
"""Left to itself, ptxas spills some numbers of a kernel with many to fit one more warp on a multiprocessor."""

_FLOOR = tl.constexpr(-1e12)  # divergence.FLOOR
_BOTH, _STUDENT_ONLY = tl.constexpr(BOTH), tl.constexpr(STUDENT_ONLY)
_REVERSE, _FORWARD = tl.constexpr(KINDS.index("reverse_kl")), tl.constexpr(KINDS.index("forward_kl"))


def num_parts(num_rows: int, num_columns: int) -> int:
    """Into how many parts to cut rows of [num_rows, columns per rank]."""
    wanted = triton.cdiv(PROGRAMS, max(1, num_rows))
    return max(1, min(wanted, num_columns // PART_COLUMNS, MOST_PARTS))


def first_pass(shard: Shard, grid: Grid, response_tokens: Tensor | None, start: int) -> tuple[Tensor, Tensor]:
    """`row_sums.first_pass`; the argmax is int32."""
    num_rows, parts = shard.student.shape[0], shard.num_parts
    sums = _new(shard, len(FIRST_PASS) + grid.num_sums)
    argmaxes = torch.empty(parts, num_rows, dtype=torch.int32, device=shard.student.device)
    if num_rows:
        first_pass_kernel[(num_rows, parts)](
            shard.student,
            shard.teacher,
            argmaxes if response_tokens is None else response_tokens.contiguous(),
            grid.on(shard.student.device),
            sums,
            argmaxes,
            *_extent(shard, first_pass_options(grid, _columns_per_load(shard))["VEC"]),
            start,
            as_sum(shard.mix_weights[0]),
            MIX=mix_of(shard.mix_weights),
            J=len(grid.betas),
            DOUBLED=sum(1 << j for j in grid.doubled),
            OCTAVE=grid.octave,
            ONE_PASS=grid.one_pass,
            WITH_FORWARD=grid.with_forward_kl,
            HAS_TOKENS=response_tokens is not None,
            **first_pass_options(grid, _columns_per_load(shard)),
        )
    return sums, argmaxes


def second_pass(shard: Shard, constants: RowConstants, mix_argmax: Tensor, *, forward_kl: bool) -> Tensor:
    """`row_sums.second_pass`."""
    sums = _new(shard, len(SECOND_PASS_FORWARD if forward_kl else SECOND_PASS))
    if sums.shape[1]:
        _second_pass_kernel[(sums.shape[1], shard.num_parts)](
            shard.student,
            shard.teacher,
            *constants.tensors(),
            mix_argmax,
            sums,
            *_extent(shard),
            as_sum(shard.mix_weights[0]),
            MIX=mix_of(shard.mix_weights),
            WITH_FORWARD=forward_kl,
            **_summing(shard),
        )
    return sums


def jsd_pass(shard: Shard, constants: RowConstants, jsd_lambda: float) -> Tensor:
    """`row_sums.jsd_pass`."""
    sums = _new(shard, 2)
    if sums.shape[1]:
        _jsd_pass_kernel[(sums.shape[1], shard.num_parts)](
            shard.student,
            shard.teacher,
            *constants.tensors(),
            sums,
            *_extent(shard),
            as_sum(shard.mix_weights[0]),
            as_sum(jsd_lambda),
            MIX=mix_of(shard.mix_weights),
            **_summing(shard),
        )
    return sums


def write_gradient(
    shard: Shard, constants: RowConstants, centre: Tensor, divergence: Divergence, grad_loss: Tensor, out: Tensor
) -> None:
    """`row_sums.write_gradient`."""
    num_rows, num_columns = shard.student.shape
    if num_rows and num_columns:
        _gradient_kernel[(num_rows, triton.cdiv(num_columns, GRADIENT_BLOCK))](
            shard.student,
            shard.teacher,
            *constants.tensors(),
            centre,
            grad_loss,
            out,
            _row_stride(shard.student),
            _row_stride(shard.teacher),
            _row_stride(out),
            centre.stride(0),
            grad_loss.stride(0),
            num_columns,
            as_sum(shard.mix_weights[0]),
            as_sum(divergence.jsd_lambda),
            MIX=mix_of(shard.mix_weights),
            KIND=KINDS.index(divergence.kind),
            BLOCK=GRADIENT_BLOCK,
            num_warps=GRADIENT_WARPS,
            **COMPILED,
        )


def _new(shard: Shard, num_columns: int) -> Tensor:
    shape = shard.num_parts, shard.student.shape[0], num_columns
    return torch.empty(shape, dtype=torch.float32, device=shard.student.device)


def first_pass_options(grid: Grid, columns_per_load: int) -> dict[str, int]:
    """Of the first pass's kernel, whose sums take most of the registers where the grid is large."""
    num_betas, options = len(grid.betas), {"LANES": LANES, "num_warps": 1, **COMPILED}
    if num_betas > 5:
        options |= ALL_REGISTERS
    crowded = grid.with_forward_kl and num_betas > 10
    return {"VEC": min(columns_per_load, 4) if crowded else columns_per_load, **options}


def _extent(shard: Shard, columns_per_load: int | None = None) -> tuple[int, int, int, int, int]:
    """Both row strides, the rows, the columns, and the blocks of a part."""
    num_rows, num_columns = shard.student.shape
    blocks = triton.cdiv(num_columns, LANES * (columns_per_load or _columns_per_load(shard)))
    strides = _row_stride(shard.student), _row_stride(shard.teacher)
    return *strides, num_rows, num_columns, triton.cdiv(blocks, shard.num_parts)


def _columns_per_load(shard: Shard) -> int:
    return LOAD_BYTES // max(shard.student.itemsize, shard.teacher.itemsize)


def _summing(shard: Shard) -> dict[str, int | bool]:
    return {"LANES": LANES, "VEC": _columns_per_load(shard), "num_warps": 1, **COMPILED}


def _row_stride(logits: Tensor) -> int:
    if logits.shape[1] > 1 and logits.stride(1) != 1:
        raise ValueError(
            "the Triton kernels of the loss need logits [T, columns] whose columns lie side by side; got strides "
            f"{logits.stride()}. Make them contiguous, or set loss.backend=torch."
        )
    return logits.stride(0)


def as_sum(value: float) -> float:
    """Rounded to float32, as a kernel's argument is; in the interpreter it would stay float64."""
    return torch.tensor(value, dtype=torch.float32).item()


def mix_of(mix_weights: tuple[float, float]) -> int:
    """BOTH, STUDENT_ONLY or TEACHER_ONLY, of ``Target.mix_weights``."""
    teacher_weight, student_weight = mix_weights
    if student_weight == 0:
        return TEACHER_ONLY
    return STUDENT_ONLY if teacher_weight == 0 else BOTH


@triton.jit(do_not_specialize=["num_rows", "num_columns", "blocks_per_part"])
def _second_pass_kernel(
    student,
    teacher,
    student_max,
    teacher_max,
    mix_max,
    student_log_sum,
    beta,
    log_sum,
    argmaxes,
    sums,
    student_stride,
    teacher_stride,
    num_rows,
    num_columns,
    blocks_per_part,
    mix_weight,
    MIX: tl.constexpr,
    WITH_FORWARD: tl.constexpr,
    LANES: tl.constexpr,
    VEC: tl.constexpr,
):
    row, part = tl.program_id(0).to(tl.int64), tl.program_id(1)
    constants = _constants(row, student_max, teacher_max, mix_max, student_log_sum, beta, log_sum)
    student += row * student_stride
    teacher += row * teacher_stride
    BLOCK: tl.constexpr = LANES * VEC
    N: tl.constexpr = 12 if WITH_FORWARD else 7
    begin = part * blocks_per_part * BLOCK
    end = tl.minimum(begin + blocks_per_part * BLOCK, num_columns)
    offsets = tl.arange(0, LANES)[:, None] * VEC + tl.arange(0, VEC)[None, :]
    argmax = tl.load(argmaxes + part.to(tl.int64) * num_rows + row)
    total = ()
    for _ in tl.static_range(N):
        total = total + (tl.zeros([LANES], tl.float32),)
    next_s, next_t = load(student, offsets, begin, end, BLOCK), load(teacher, offsets, begin, end, BLOCK)
    for start in range(begin, end, BLOCK):
        s, t = next_s.to(tl.float32), next_t.to(tl.float32)
        next_s = load(student, offsets, start + BLOCK, end, BLOCK)
        next_t = load(teacher, offsets, start + BLOCK, end, BLOCK)
        y, x = _shifted(s, t, constants, mix_weight, MIX)
        p, q, d = _ratio(y, x, constants)
        difference = _q_minus_p(p, q, d)
        qy, reverse_kl, forward_kl = q * y, difference - p * d, q * d - difference
        q = tl.where(offsets == argmax - start, 0.0, q)
        square = x * x
        qs, xs, squares = columns_of(q), columns_of(x), columns_of(square)
        cubes, ps = columns_of(square * x), columns_of(p)
        terms = (
            sum_of(qs),
            sum_of_products(qs, xs),
            sum_of_products(qs, squares),
            sum_of_products(qs, cubes),
            sum_of_products(columns_of(q * square), squares),  # q first: FLOOR^4 is no float32
            sum_of(columns_of(reverse_kl)),
            sum_of_products(ps, xs),
        )
        if WITH_FORWARD:
            qys = columns_of(qy)
            terms = terms + (sum_of(columns_of(forward_kl)), sum_of(qys), sum_of_products(qys, xs))
            terms = terms + (sum_of_products(qys, squares), sum_of_products(qys, cubes))
        new = ()
        for i in tl.static_range(N):
            new = new + (total[i] + terms[i],)
        total = new
    out = sums + (part.to(tl.int64) * num_rows + row) * N
    for i in tl.static_range(N):
        tl.store(out + i, tl.sum(total[i], 0))


@triton.jit(do_not_specialize=["num_rows", "num_columns", "blocks_per_part"])
def _jsd_pass_kernel(
    student,
    teacher,
    student_max,
    teacher_max,
    mix_max,
    student_log_sum,
    beta,
    log_sum,
    sums,
    student_stride,
    teacher_stride,
    num_rows,
    num_columns,
    blocks_per_part,
    mix_weight,
    jsd_lambda,
    MIX: tl.constexpr,
    LANES: tl.constexpr,
    VEC: tl.constexpr,
):
    row, part = tl.program_id(0).to(tl.int64), tl.program_id(1)
    constants = _constants(row, student_max, teacher_max, mix_max, student_log_sum, beta, log_sum)
    student += row * student_stride
    teacher += row * teacher_stride
    BLOCK: tl.constexpr = LANES * VEC
    begin = part * blocks_per_part * BLOCK
    end = tl.minimum(begin + blocks_per_part * BLOCK, num_columns)
    offsets = tl.arange(0, LANES)[:, None] * VEC + tl.arange(0, VEC)[None, :]
    jsd, kl_p_mixture = tl.zeros([LANES], tl.float32), tl.zeros([LANES], tl.float32)
    next_s, next_t = load(student, offsets, begin, end, BLOCK), load(teacher, offsets, begin, end, BLOCK)
    for start in range(begin, end, BLOCK):
        s, t = next_s.to(tl.float32), next_t.to(tl.float32)
        next_s = load(student, offsets, start + BLOCK, end, BLOCK)
        next_t = load(teacher, offsets, start + BLOCK, end, BLOCK)
        y, x = _shifted(s, t, constants, mix_weight, MIX)
        p, q, d = _ratio(y, x, constants)
        over_larger = _log_mixture_over_larger(d, jsd_lambda)
        # minimum and maximum may drop a NaN of d, which p or q still hold
        over_p, over_q = over_larger + tl.maximum(d, 0.0), tl.minimum(d, 0.0) - over_larger
        jsd += sum_of(columns_of(jsd_lambda * (q * over_q) - (1 - jsd_lambda) * (p * over_p)))
        kl_p_mixture -= sum_of_products(columns_of(p), columns_of(over_p))
    out = sums + (part.to(tl.int64) * num_rows + row) * 2
    tl.store(out, tl.sum(jsd, 0))
    tl.store(out + 1, tl.sum(kl_p_mixture, 0))


@triton.jit(do_not_specialize=["num_columns"])
def _gradient_kernel(
    student,
    teacher,
    student_max,
    teacher_max,
    mix_max,
    student_log_sum,
    beta,
    log_sum,
    centres,
    grad_losses,
    out,
    student_stride,
    teacher_stride,
    out_stride,
    centre_stride,
    grad_loss_stride,
    num_columns,
    mix_weight,
    jsd_lambda,
    MIX: tl.constexpr,
    KIND: tl.constexpr,
    BLOCK: tl.constexpr,
):
    # A program reads a block and then writes it: ``out`` may be the student's logits.
    row, start = tl.program_id(0).to(tl.int64), tl.program_id(1) * BLOCK
    constants = _constants(row, student_max, teacher_max, mix_max, student_log_sum, beta, log_sum)
    centre, grad_loss = tl.load(centres + row * centre_stride), tl.load(grad_losses + row * grad_loss_stride)
    offsets = tl.arange(0, BLOCK)
    s = load(student + row * student_stride, offsets, start, num_columns, BLOCK).to(tl.float32)
    t = load(teacher + row * teacher_stride, offsets, start, num_columns, BLOCK).to(tl.float32)
    y, x = _shifted(s, t, constants, mix_weight, MIX)
    p, q, d = _ratio(y, x, constants)
    if KIND == _REVERSE:
        gradient = -p * (d + centre)
    elif KIND == _FORWARD:
        gradient = -_q_minus_p(p, q, d)
    else:
        over_p = _log_mixture_over_larger(d, jsd_lambda) + tl.maximum(d, 0.0)
        gradient = (jsd_lambda - 1) * p * (over_p + centre)
    gradient = (gradient * grad_loss).to(out.dtype.element_ty)
    out += row * out_stride + start
    if start + BLOCK <= num_columns:
        tl.store(out + offsets, gradient)
    else:
        tl.store(out + offsets, gradient, mask=offsets < num_columns - start)


@triton.jit
def _constants(row, student_max, teacher_max, mix_max, student_log_sum, beta, log_sum):
    return (
        tl.load(student_max + row),
        tl.load(teacher_max + row),
        tl.load(mix_max + row),
        tl.load(student_log_sum + row),
        tl.load(beta + row),
        tl.load(log_sum + row),
    )


@triton.jit
def _shifted(s, t, constants, mix_weight, MIX: tl.constexpr):
    """y and x, relative to the maxima of the whole vocabulary; -inf becomes FLOOR and NaN stays."""
    y, z = s - constants[0], t - constants[1]
    if MIX == _BOTH:
        x = (mix_weight * z + y) - constants[2]
    elif MIX == _STUDENT_ONLY:
        x = y - constants[2]
    else:
        x = z - constants[2]
    x = tl.maximum(x, _FLOOR, propagate_nan=tl.PropagateNan.ALL)
    return tl.maximum(y, _FLOOR, propagate_nan=tl.PropagateNan.ALL), x


@triton.jit
def _ratio(y, x, constants):
    """p, q and log q - log p."""
    log_p, log_q = y - constants[3], x * constants[4] - constants[5]
    return exponential(log_p), exponential(log_q), log_q - log_p


@triton.jit
def _q_minus_p(p, q, d):
    """q - p, exact to the last digits also where they are close."""
    smaller = exp_minus_one(-tl.abs(d)) * tl.maximum(p, q)
    return tl.where(d > 0, -smaller, smaller)


@triton.jit
def _log_mixture_over_larger(d, jsd_lambda):
    """log(M / max(p, q)) with M = lam q + (1 - lam) p."""
    weight_of_smaller = tl.where(d > 0, 1 - jsd_lambda, jsd_lambda)
    return log_one_plus(exp_minus_one(-tl.abs(d)) * weight_of_smaller)
