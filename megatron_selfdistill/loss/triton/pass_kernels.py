# Copyright (c) 2026 the megatron_selfdistill authors. Apache-2.0.
# mypy: disable-error-code="assignment, misc"
# ruff: noqa: RUF005
"""The Triton kernels of the second pass, of the pass of the JSD and of the gradient.

Twin: `sharded/shard_sums.py`.
pass_launches.py launches them.  The formulas are the formulas of `divergence`.
"""

from __future__ import annotations

import triton
import triton.language as tl

from megatron_selfdistill.choices import DIVERGENCES
from megatron_selfdistill.loss.divergence import FLOOR
from megatron_selfdistill.loss.status import Status
from megatron_selfdistill.loss.triton.block_loads import fetched, load, numbers_of, with_end
from megatron_selfdistill.loss.triton.first_pass_kernel import BOTH, STUDENT_ONLY
from megatron_selfdistill.loss.triton.kernel_math import (
    columns_of,
    exp_minus_one,
    exponential,
    log_one_plus,
    sum_of,
    sum_of_products,
)

_FLOOR = tl.constexpr(FLOOR)
_BOTH, _STUDENT_ONLY = tl.constexpr(BOTH), tl.constexpr(STUDENT_ONLY)
_UNCONVERGED = tl.constexpr(int(Status.UNCONVERGED))
_REVERSE, _FORWARD = tl.constexpr(DIVERGENCES.index("reverse_kl")), tl.constexpr(DIVERGENCES.index("forward_kl"))


@triton.jit(do_not_specialize=["num_rows", "num_columns", "blocks_per_part"])
def second_pass_kernel(
    student,
    teacher,
    student_max,
    teacher_max,
    mix_max,
    student_log_sum,
    beta,
    log_sum,
    argmaxes,
    statuses,
    sums,
    student_stride,
    teacher_stride,
    num_rows,
    num_columns,
    blocks_per_part,
    mix_weight,
    MIX: tl.constexpr,
    WITH_FORWARD: tl.constexpr,
    SOME_ROWS: tl.constexpr,
    LANES: tl.constexpr,
    VEC: tl.constexpr,
    PACKED: tl.constexpr,
):
    """Write one row of ``shard_sums.second_pass``.

    SOME_ROWS: a token that is not UNCONVERGED gives zeros, and its logits are not read.
    """
    row, part = tl.program_id(0).to(tl.int64), tl.program_id(1)
    constants = _constants(row, student_max, teacher_max, mix_max, student_log_sum, beta, log_sum)
    student += row * student_stride
    teacher += row * teacher_stride
    BLOCK: tl.constexpr = LANES * VEC
    N: tl.constexpr = 11 if WITH_FORWARD else 6
    begin = part * blocks_per_part * BLOCK
    end = tl.minimum(begin + blocks_per_part * BLOCK, num_columns)
    if SOME_ROWS:
        end = tl.where(tl.load(statuses + row) == _UNCONVERGED, end, begin)
    lane = tl.arange(0, LANES)
    offsets = lane[:, None] * VEC + tl.arange(0, VEC)[None, :]
    argmax = tl.load(argmaxes + part.to(tl.int64) * num_rows + row)
    total = ()
    for _ in tl.static_range(N):
        total = total + (tl.zeros([LANES], tl.float32),)
    next_s, next_t = fetched(student, lane, begin, end, VEC, PACKED), fetched(teacher, lane, begin, end, VEC, PACKED)
    for start in range(begin, end, BLOCK):
        s, t = numbers_of(next_s, student, lane, VEC, PACKED), numbers_of(next_t, teacher, lane, VEC, PACKED)
        next_s = fetched(student, lane, start + BLOCK, end, VEC, PACKED)
        next_t = fetched(teacher, lane, start + BLOCK, end, VEC, PACKED)
        s, t = with_end(s, student, lane, start, end, VEC), with_end(t, teacher, lane, start, end, VEC)
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
def jsd_pass_kernel(
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
    PACKED: tl.constexpr,
):
    """Write one row of ``shard_sums.jsd_pass``."""
    row, part = tl.program_id(0).to(tl.int64), tl.program_id(1)
    constants = _constants(row, student_max, teacher_max, mix_max, student_log_sum, beta, log_sum)
    student += row * student_stride
    teacher += row * teacher_stride
    BLOCK: tl.constexpr = LANES * VEC
    begin = part * blocks_per_part * BLOCK
    end = tl.minimum(begin + blocks_per_part * BLOCK, num_columns)
    lane = tl.arange(0, LANES)
    jsd, kl_p_mixture = tl.zeros([LANES], tl.float32), tl.zeros([LANES], tl.float32)
    next_s, next_t = fetched(student, lane, begin, end, VEC, PACKED), fetched(teacher, lane, begin, end, VEC, PACKED)
    for start in range(begin, end, BLOCK):
        s, t = numbers_of(next_s, student, lane, VEC, PACKED), numbers_of(next_t, teacher, lane, VEC, PACKED)
        next_s = fetched(student, lane, start + BLOCK, end, VEC, PACKED)
        next_t = fetched(teacher, lane, start + BLOCK, end, VEC, PACKED)
        s, t = with_end(s, student, lane, start, end, VEC), with_end(t, teacher, lane, start, end, VEC)
        y, x = _shifted(s, t, constants, mix_weight, MIX)
        p, q, d = _ratio(y, x, constants)
        over_larger = _log_mixture_over_larger(d, jsd_lambda)
        # minimum and maximum may drop a NaN of d, but p or q still holds it
        over_p, over_q = over_larger + tl.maximum(d, 0.0), tl.minimum(d, 0.0) - over_larger
        jsd += sum_of(columns_of(jsd_lambda * (q * over_q) - (1 - jsd_lambda) * (p * over_p)))
        kl_p_mixture -= sum_of_products(columns_of(p), columns_of(over_p))
    out = sums + (part.to(tl.int64) * num_rows + row) * 2
    tl.store(out, tl.sum(jsd, 0))
    tl.store(out + 1, tl.sum(kl_p_mixture, 0))


@triton.jit(do_not_specialize=["num_columns"])
def gradient_kernel(
    student,
    teacher,
    student_max,
    teacher_max,
    mix_max,
    student_log_sum,
    beta,
    log_sum,
    kl_values,
    grad_losses,
    grad_log_probs,
    token_columns,
    out,
    student_stride,
    teacher_stride,
    out_stride,
    kl_stride,
    grad_loss_stride,
    num_columns,
    mix_weight,
    jsd_lambda,
    MIX: tl.constexpr,
    KIND: tl.constexpr,
    WITH_LOG_PROB: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """Write one block of ``shard_sums.write_gradient``.

    WITH_LOG_PROB: whether the log-prob of the response token has a gradient; else its two operands are not read.
    A program reads a block and then writes it, because ``out`` may be the student's logits.
    """
    row, start = tl.program_id(0).to(tl.int64), tl.program_id(1) * BLOCK
    constants = _constants(row, student_max, teacher_max, mix_max, student_log_sum, beta, log_sum)
    kl_value, grad_loss = tl.load(kl_values + row * kl_stride), tl.load(grad_losses + row * grad_loss_stride)
    offsets = tl.arange(0, BLOCK)
    s = load(student + row * student_stride, offsets, start, num_columns, BLOCK).to(tl.float32)
    t = load(teacher + row * teacher_stride, offsets, start, num_columns, BLOCK).to(tl.float32)
    y, x = _shifted(s, t, constants, mix_weight, MIX)
    p, q, d = _ratio(y, x, constants)
    if KIND == _REVERSE:
        gradient = -p * (d + kl_value)
    elif KIND == _FORWARD:
        gradient = -_q_minus_p(p, q, d)
    else:
        over_p = _log_mixture_over_larger(d, jsd_lambda) + tl.maximum(d, 0.0)
        gradient = (jsd_lambda - 1) * p * (over_p + kl_value)
    gradient = gradient * grad_loss
    if WITH_LOG_PROB:
        here = offsets == tl.load(token_columns + row) - start
        gradient += tl.load(grad_log_probs + row) * (tl.where(here, 1.0, 0.0) - p)
    gradient = gradient.to(out.dtype.element_ty)
    out += row * out_stride + start
    if start + BLOCK <= num_columns:
        tl.store(out + offsets, gradient)
    else:
        tl.store(out + offsets, gradient, mask=offsets < num_columns - start)


@triton.jit
def _constants(row, student_max, teacher_max, mix_max, student_log_sum, beta, log_sum):
    """Return the `TokenConstants` of one token."""
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
    """Return y and x, relative to the maxima of the whole vocabulary; -inf becomes FLOOR, and NaN stays."""
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
    """Return p, q and log q - log p."""
    log_p, log_q = y - constants[3], x * constants[4] - constants[5]
    return exponential(log_p), exponential(log_q), log_q - log_p


@triton.jit
def _q_minus_p(p, q, d):
    """Return q - p, exact to the last digits also where q and p are close."""
    smaller = exp_minus_one(-tl.abs(d)) * tl.maximum(p, q)
    return tl.where(d > 0, -smaller, smaller)


@triton.jit
def _log_mixture_over_larger(d, jsd_lambda):
    """Return log(M / max(p, q)) with M = lam q + (1 - lam) p."""
    weight_of_smaller = tl.where(d > 0, 1 - jsd_lambda, jsd_lambda)
    return log_one_plus(exp_minus_one(-tl.abs(d)) * weight_of_smaller)
