# Copyright (c) 2026 the megatron_selfdistill authors. Apache-2.0.
"""Functions of one number that the Triton kernels share: operations of torch that Triton lacks.

Twin: none; PyTorch reads and computes with its own operations.
They are written here and not taken from libdevice, because the interpreter, in which the kernels are tested without a
GPU, has no libdevice.
"""

from __future__ import annotations

import triton
import triton.language as tl

LOG2_E = tl.constexpr(1.4426950408889634)


@triton.jit
def exponential(a):
    """Return e^a, float32.

    tl.exp would take three more instructions for results below 1e-38, which are 0 here.
    """
    return tl.exp2(a * LOG2_E)


@triton.jit
def exp_minus_one(a):
    """Return e^a - 1 for a <= 0, float32; near 0 by a series whose next term is 1e-8 of the result."""
    series = 1 / 5040 + a * (1 / 40320)
    series = 1 / 24 + a * (1 / 120 + a * (1 / 720 + a * series))
    series = a * (1 + a * (1 / 2 + a * (1 / 6 + a * series)))
    return tl.where(a > -0.5, series, exponential(a) - 1)


@triton.jit
def log_one_plus(u):
    """Return log(1 + u) for -1 < u <= 0, float32.

    Near 0 it is 2 artanh(u / (2 + u)), by a series whose next term is 1e-8 of the result.
    """
    ratio = u / (2 + u)
    square = ratio * ratio
    series = 1 / 9 + square * (1 / 11 + square * (1 / 13))
    series = 1 + square * (1 / 3 + square * (1 / 5 + square * (1 / 7 + square * series)))
    return tl.where(u > -0.5, 2 * ratio * series, tl.log(1 + u))


@triton.jit
def log_one_plus_64(u):
    """Return log(1 + u) for u > -1, float64; the rounding of 1 + u cancels in the quotient (Kahan)."""
    total = 1 + u
    near = total == 1
    return tl.where(near, u, tl.log(total) * (u / tl.where(near, 1.0, total - 1)))


@triton.jit
def exp_minus_one_64(u):
    """Return e^u - 1, float64; the rounding of e^u cancels in the quotient (Kahan)."""
    power = tl.exp(u)
    near, gone = power == 1, power == 0
    logarithm = tl.log(tl.where(near | gone, 2.0, power))
    return tl.where(near, u, tl.where(gone, -1.0, (power - 1) * (u / logarithm)))


@triton.jit
def at_least(value, least):
    """Return torch's ``clamp(min=least)``: NaN stays."""
    return tl.where(value < least, least, value)


@triton.jit
def at_most(value, most):
    """Return torch's ``clamp(max=most)``: NaN stays."""
    return tl.where(value > most, most, value)


@triton.jit
def is_finite(value):
    """Return whether the value is neither infinite nor NaN."""
    return (value - value) == 0


@triton.jit
def as_float32(value):
    """Round a float64 value to float32, which the passes over the logits can hold; return it as float64."""
    return value.to(tl.float32).to(tl.float64)


@triton.jit
def highest_of(values):
    """Return torch's ``amax`` over axis 1: NaN if there is one."""
    has_nan = tl.max((values != values).to(tl.int32), 1) > 0
    known = tl.where(values == values, values, float("-inf"))
    return tl.where(has_nan, float("nan"), tl.max(known, 1))


@triton.jit
def columns_of(block):
    """Return the 4 or 8 columns of a lane: [lanes, n] -> n times [lanes].

    They are registers of one thread, so no data moves.
    """
    if block.shape[1] == 8:
        even, odd = tl.split(tl.reshape(block, [block.shape[0], 2, 2, 2]))
        columns = _four_of(even) + _four_of(odd)
    else:
        columns = _four_of(tl.reshape(block, [block.shape[0], 2, 2]))
    return columns


@triton.jit
def _four_of(block):
    """Return the 4 columns of [lanes, 2, 2]."""
    even, odd = tl.split(block)
    first, third = tl.split(even)
    second, fourth = tl.split(odd)
    return (first, second, third, fourth)


@triton.jit
def sum_of(columns):
    """Return the sum of the columns, per lane.

    tl.sum would add products that it has rounded; here each product and its addition are one fma.
    """
    total = columns[0]
    for i in tl.static_range(1, len(columns)):
        total += columns[i]
    return total


@triton.jit
def sum_of_products(columns, others):
    """Return the sum of the products of two lists of columns, per lane."""
    total = columns[0] * others[0]
    for i in tl.static_range(1, len(columns)):
        total += columns[i] * others[i]
    return total
