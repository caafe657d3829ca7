# Copyright (c) 2026 the megatron_selfdistill authors. Apache-2.0.
# mypy: disable-error-code="assignment, misc"
# ruff: noqa: RUF005
"""The Triton kernels of the first and the second pass, of the pass of the JSD and of the gradient.

Twin: `sharded/shard_sums.py`.
pass_launches.py launches them.  The formulas are the formulas of `loss.target`.

The first pass takes all sums of student, teacher and mix from one read.
One program of one warp works on one part of one row.  Each lane keeps sums of its own, relative to the running maxima,
which are scalars: in the steady state nothing crosses lanes but one vote per block.
Where a block holds a new maximum or a column that does not exist, a branch moves the sums to the new maximum: S_k of x
+ d is a binomial of S_0 .. S_k of x, times e^(beta d).
A block is summed before it is added to the sums: added one by one, many small terms would vanish in a long sum.

The largest column so far, e^0 = 1, stays out of the sums (which are then tails) and is put back when another column
takes its place.
The mix is x = w (t - teacher_max) + (s - mix_ref).  Differences come first, so logits of any height lose no digits.
teacher_max and mix_ref move while the row is read, and float64 arithmetic corrects for this.

The kernels read logits one block ahead of their sums, in the words of wide loads.  PyTorch has no twin of the reading.
A pass takes the numbers out of a block's words, starts to read the next block, then works.  Three rules let this order
survive compilation (``tools/benchmarks/kernel_report.py`` shows how many instructions lie between a load and its first
use):

- A block that is being read is held as words of 4 bytes.  Numbers of 16 bits would be unpacked at the load, which waits
  there.
- A load under a mask is one instruction.  In a branch, its result would be copied behind the branch, which waits too.
- The last block of a part, if it is incomplete, is read in a branch between the load of the next block and the work:
  ptxas moves loads towards their use, but not across a branch.
"""

from __future__ import annotations

import triton
import triton.language as tl

from megatron_selfdistill.choices import DIVERGENCES
from megatron_selfdistill.kernels.kernel_math import (
    LOG2_E,
    columns_of,
    exp_minus_one,
    exponential,
    log_one_plus,
    sum_of,
    sum_of_products,
)
from megatron_selfdistill.loss.divergence import FLOOR
from megatron_selfdistill.loss.target import Status

BOTH, STUDENT_ONLY, TEACHER_ONLY = 0, 1, 2
"""The logits that the mix is made of: w t + s, s alone (w = 0), or t alone (teacher_alone)."""
_BOTH = tl.constexpr(BOTH)
_STUDENT_ONLY = tl.constexpr(STUDENT_ONLY)
_TEACHER_ONLY = tl.constexpr(TEACHER_ONLY)
_FAR = tl.constexpr(-1e30)  # the logit of a column that does not exist; it lies below _NOTHING
_NOTHING = tl.constexpr(-5e29)  # the maximum before any column has been seen: every logit lies above it
_UNUSUAL = tl.constexpr(-1e11)  # an x below this calls for the branch, which clamps
_NO_COLUMN = tl.constexpr(2**31 - 1)
_FLOOR = tl.constexpr(FLOOR)
_UNCONVERGED = tl.constexpr(int(Status.UNCONVERGED))
RENYI = len(DIVERGENCES)
"""The kind of `gradient_kernel` for Renyi divergences of either direction."""
_RENYI = tl.constexpr(RENYI)
_REVERSE, _FORWARD = tl.constexpr(DIVERGENCES.index("reverse_kl")), tl.constexpr(DIVERGENCES.index("forward_kl"))


@triton.jit
def fetched(row, lane, start, end, VEC: tl.constexpr, PACKED: tl.constexpr):
    """Start to read a block of a row, VEC columns per lane; read nothing unless the whole block lies before ``end``.

    PACKED: rows begin on 16-byte boundaries.  Otherwise numbers of 16 bits are read one by one.
    """
    if PACKED:
        words, columns = _words(row + start, lane, VEC)
    else:
        words, columns = row + start, _columns(lane, VEC)
    whole = tl.zeros_like(columns) + (start + lane.shape[0] * VEC) <= end
    block = tl.load(words + columns, mask=whole)
    return block


@triton.jit
def numbers_of(block, row, lane, VEC: tl.constexpr, PACKED: tl.constexpr):
    """Return the block that `fetched` read as float32 [lanes, VEC]."""
    return _unpacked(block, row, lane, VEC) if PACKED else block.to(tl.float32)


@triton.jit
def with_end(numbers, row, lane, start, end, VEC: tl.constexpr):
    """Return the numbers of the block at ``start``; an incomplete block is read here, with -inf beyond ``end``."""
    if start + lane.shape[0] * VEC > end:
        columns = _columns(lane, VEC)
        numbers = tl.load(row + start + columns, mask=columns < end - start, other=float("-inf")).to(tl.float32)
    return numbers


@triton.jit
def _words(start, lane, VEC: tl.constexpr):
    """Return a pointer to words of 4 bytes, and the indices of the words of each lane."""
    if start.dtype.element_ty.is_fp32():
        words, columns = start, _columns(lane, VEC)
    else:
        words, columns = start.to(tl.pointer_type(tl.int32)), _columns(lane, VEC // 2)
    return words, columns


@triton.jit
def _unpacked(block, row, lane, VEC: tl.constexpr):
    """Return the float32 numbers in a block of words."""
    if row.dtype.element_ty.is_fp32():
        numbers = block
    else:
        if row.dtype.element_ty.is_bf16():
            even, odd = (block << 16).to(tl.float32, bitcast=True), (block & -65536).to(tl.float32, bitcast=True)
        else:
            even = block.to(tl.int16).to(tl.float16, bitcast=True).to(tl.float32)
            odd = (block >> 16).to(tl.int16).to(tl.float16, bitcast=True).to(tl.float32)
        numbers = tl.reshape(tl.join(even, odd), [lane.shape[0], VEC])
    return numbers


@triton.jit
def _columns(lane, VEC: tl.constexpr):
    """Return the columns of each lane within a block, [lanes, VEC]."""
    return lane[:, None] * VEC + tl.arange(0, VEC)[None, :]


@triton.jit
def load(row, offsets, start, end, BLOCK: tl.constexpr):
    """Return a block of a row, read at once, with -inf beyond ``end``.

    A whole block is read without a mask, which would split wide loads.
    """
    if start + BLOCK <= end:
        block = tl.load(row + start + offsets)
    else:
        block = tl.load(row + start + offsets, mask=offsets < end - start, other=float("-inf"))
    return block


@triton.jit(do_not_specialize=["num_rows", "num_columns", "blocks_per_part", "first_column"])
def first_pass_kernel(
    student,
    teacher,
    tokens,
    betas,
    sums,
    argmaxes,
    student_stride,
    teacher_stride,
    num_rows,
    num_columns,
    blocks_per_part,
    first_column,
    mix_weight,
    MIX: tl.constexpr,
    J: tl.constexpr,
    DOUBLED: tl.constexpr,
    HAS_TOKENS: tl.constexpr,
    LANES: tl.constexpr,
    VEC: tl.constexpr,
    PACKED: tl.constexpr,
):
    """Write one row of ``shard_sums.first_pass``.

    DOUBLED: bit j is set where j is in ``BetaGrid.doubled``.
    """
    row, part = tl.program_id(0).to(tl.int64), tl.program_id(1)
    student += row * student_stride
    teacher += row * teacher_stride
    BLOCK: tl.constexpr = LANES * VEC
    begin = part * blocks_per_part * BLOCK
    end = tl.minimum(begin + blocks_per_part * BLOCK, num_columns)
    lane = tl.arange(0, LANES)
    offsets = lane[:, None] * VEC + tl.arange(0, VEC)[None, :]

    zero = tl.zeros([LANES], tl.float32)
    nothing, no_column = tl.full([], _NOTHING, tl.float32), tl.full([], 0, tl.int32)
    student_side = (nothing, no_column, zero, zero)
    teacher_side = (nothing, no_column, zero, zero)
    mix_side = (nothing, no_column)
    missing = (no_column, no_column, no_column)
    moments = ()
    for _ in tl.static_range(4 * J):
        moments = moments + (zero,)

    next_s, next_t = fetched(student, lane, begin, end, VEC, PACKED), fetched(teacher, lane, begin, end, VEC, PACKED)
    for start in range(begin, end, BLOCK):
        s, t = numbers_of(next_s, student, lane, VEC, PACKED), numbers_of(next_t, teacher, lane, VEC, PACKED)
        next_s = fetched(student, lane, start + BLOCK, end, VEC, PACKED)
        next_t = fetched(teacher, lane, start + BLOCK, end, VEC, PACKED)
        s, t = with_end(s, student, lane, start, end, VEC), with_end(t, teacher, lane, start, end, VEC)
        y, z = s - student_side[0], t - teacher_side[0]
        x = _mixed(s, y, z, mix_side[0], mix_weight, MIX)
        if _is_unusual(y, z, x, MIX):
            columns = start + offsets
            s_there, t_there = s > _FAR, t > _FAR
            missing = _add_missing(missing, s_there, t_there)
            s = tl.maximum(s, _FAR, propagate_nan=tl.PropagateNan.ALL)
            t = tl.maximum(t, _FAR, propagate_nan=tl.PropagateNan.ALL)
            old_student, old_teacher = student_side[0], teacher_side[0]
            student_side = _raised(student_side, s, columns, lane)
            teacher_side = _raised(teacher_side, t, columns, lane)
            y, z = s - student_side[0], t - teacher_side[0]
            if MIX == _BOTH:
                there = s_there & t_there
                mix_side, step, displaced = _raised_mix(
                    mix_side, s, z, there, columns, student_side[0], old_teacher, teacher_side[0], mix_weight
                )
                x = tl.where(there | (s != s) | (t != t), mix_weight * z + (s - mix_side[0]), _FLOOR)
            elif MIX == _STUDENT_ONLY:
                mix_side, x = (student_side[0], student_side[1]), y
                step, displaced = _step(old_student, student_side[0])
            else:
                mix_side, x = (teacher_side[0], teacher_side[1]), z
                step, displaced = _step(old_teacher, teacher_side[0])
            put_back = tl.where(lane == 0, displaced.to(tl.float32), 0.0)
            moments = _moved_moments(moments, betas, step, put_back, J)
            x = tl.maximum(x, _FLOOR, propagate_nan=tl.PropagateNan.ALL)
            y = tl.where(columns == student_side[1], _FLOOR, y)
            z = tl.where(columns == teacher_side[1], _FLOOR, z)
            x = tl.where(columns == mix_side[1], _FLOOR, x)
        student_side = _with_block(student_side, y)
        teacher_side = _with_block(teacher_side, z)
        moments = _with_moments(moments, x, betas, J, DOUBLED)

    num_read = tl.cdiv(tl.maximum(end - begin, 0), BLOCK) * BLOCK
    mix_max = _mix_max(student_side, teacher_side, mix_side, moments, MIX)
    out = sums + (part.to(tl.int64) * num_rows + row) * (14 + 4 * J)
    _store_side(out, student_side, first_column)
    _store_side(out + 4, teacher_side, first_column)
    tl.store(out + 8, mix_max)
    for i in tl.static_range(3):
        tl.store(out + 9 + i, (num_read - _missing_of(missing, i, MIX)).to(tl.float32))
    for i in tl.static_range(4 * J):
        tl.store(out + 12 + i, tl.sum(moments[i], 0))
    out += 12 + 4 * J
    if HAS_TOKENS:
        token = tl.load(tokens + row) - first_column
        here = (token >= begin) & (token < end)
        tl.store(out, tl.load(student + token, mask=here, other=0.0).to(tl.float32))
        tl.store(out + 1, tl.load(teacher + token, mask=here, other=0.0).to(tl.float32))
    else:
        tl.store(out, 0.0)
        tl.store(out + 1, 0.0)
    tl.store(argmaxes + part.to(tl.int64) * num_rows + row, mix_side[1])


@triton.jit
def _mixed(s, y, z, mix_ref, mix_weight, MIX: tl.constexpr):
    """Return x, the mix relative to its running reference."""
    if MIX == _BOTH:
        x = mix_weight * z + (s - mix_ref)
    elif MIX == _STUDENT_ONLY:
        x = y
    else:
        x = z
    return x


@triton.jit
def _is_unusual(y, z, x, MIX: tl.constexpr):
    """Return whether the block holds a new maximum, or a column that does not exist.

    x of such a column is -inf, or y or z is.
    """
    highest = tl.max(tl.maximum(tl.maximum(y, z), x), 1)
    lowest = tl.min(x, 1) if MIX == _BOTH else tl.min(tl.minimum(y, z), 1)
    # A maximum may or may not return NaN; NaN reaches the sums in both cases.
    unusual = (highest > 0) | (highest != highest) | (lowest < _UNUSUAL)
    return tl.max(unusual.to(tl.int32), 0) > 0


@triton.jit
def _add_missing(missing, s_there, t_there):
    """Add the numbers of columns of a block that do not exist for the student, for the teacher, and for one of them."""
    return (missing[0] + _count(~s_there), missing[1] + _count(~t_there), missing[2] + _count(~(s_there & t_there)))


@triton.jit
def _count(flags):
    """Return the number of flags that are set in a block."""
    return tl.sum(tl.sum(flags.to(tl.int32), 1), 0)


@triton.jit
def _missing_of(missing, i: tl.constexpr, MIX: tl.constexpr):
    """Return the number of columns that do not exist for the student (i = 0), the mix (1), one of the two (2)."""
    if i == 0 or MIX == _STUDENT_ONLY:
        count = missing[0]
    elif i == 1 and MIX == _TEACHER_ONLY:
        count = missing[1]
    else:
        count = missing[2]
    return count


@triton.jit
def _highest(values):
    """Return the maximum of a block.

    NaN counts as a column that does not exist; it turns the sums into NaN by itself.
    """
    return tl.max(tl.max(tl.where(values == values, values, _FAR), 1), 0)


@triton.jit
def _column_of(values, value, columns):
    """Return the lowest column that has this value."""
    return tl.min(tl.min(tl.where(values == value, columns, _NO_COLUMN), 1), 0)


@triton.jit
def _step(old, new):
    """Return (old - new, whether a largest column is displaced).

    Before the first column there is nothing to move.
    """
    displaced = (new > old) & (old > _NOTHING)
    return tl.where(displaced, old - new, 0.0), displaced


@triton.jit
def _raised(side, values, columns, lane):
    """Return (maximum, argmax, tail, first) relative to the maximum of all columns that were read and of this block."""
    highest = _highest(values)
    higher = highest > side[0]
    maximum = tl.where(higher, highest, side[0])
    argmax = tl.where(higher, _column_of(values, highest, columns), side[1])
    step, displaced = _step(side[0], maximum)
    total = side[2] + tl.where(lane == 0, displaced.to(tl.float32), 0.0)
    scale = exponential(step)
    return (maximum, argmax, scale * total, scale * (side[3] + step * total))


@triton.jit
def _raised_mix(mix_side, s, z, there, columns, student_max, old_teacher_max, teacher_max, mix_weight):
    """Return the mix's reference after a block, the step d of the sums, and whether the largest column is displaced.

    m = w t + s is relative to height = w teacher_max + mix_ref.  A new teacher_max moves mix_ref too, and d includes
    the part of this move that float32 cannot hold.
    """
    begun = mix_side[0] > _NOTHING
    weight = tl.full([], mix_weight, tl.float64)
    height = weight * old_teacher_max.to(tl.float64) + mix_side[0].to(tl.float64)
    moved = (height - weight * teacher_max.to(tl.float64)).to(tl.float32)
    mix_ref = tl.where(begun, moved, student_max)
    x = tl.where(there, mix_weight * z + (s - mix_ref), _FAR)
    highest = _highest(x)
    higher = tl.where(begun, highest > 0, highest > _NOTHING)
    argmax = tl.where(higher, _column_of(x, highest, columns), mix_side[1])
    new_ref = tl.where(higher, mix_ref + highest, tl.where(begun, mix_ref, _NOTHING))
    new_height = weight * teacher_max.to(tl.float64) + new_ref.to(tl.float64)
    step = tl.where(begun, (height - new_height).to(tl.float32), 0.0)
    return (new_ref, argmax), step, higher & begun


@triton.jit
def _moved_moments(moments, betas, step, put_back, J: tl.constexpr):
    """Return S0 - 1, S1, S2, S3 of x + step instead of x, with the displaced column put back into S0."""
    out = ()
    for j in tl.static_range(J):
        scale = exponential(tl.load(betas + j) * step)
        s0, s1, s2, s3 = moments[4 * j] + put_back, moments[4 * j + 1], moments[4 * j + 2], moments[4 * j + 3]
        out = out + (
            scale * s0,
            scale * (s1 + step * s0),
            scale * (s2 + step * (2 * s1 + step * s0)),
            scale * (s3 + step * (3 * s2 + step * (3 * s1 + step * s0))),
        )
    return out


@triton.jit
def _with_block(side, shifted):
    """Add a block to the tail and first sum of one side."""
    es, values = columns_of(exponential(shifted)), columns_of(shifted)
    return (side[0], side[1], side[2] + sum_of(es), side[3] + sum_of_products(es, values))


@triton.jit
def _with_moments(moments, x, betas, J: tl.constexpr, DOUBLED: tl.constexpr):
    """Add a block to the moments of every beta."""
    square = x * x
    xs, squares, cubes = columns_of(x), columns_of(square), columns_of(square * x)
    e, out = x, ()
    for j in tl.static_range(J):
        e = e * e if (DOUBLED >> j) & 1 else tl.exp2(x * (tl.load(betas + j) * LOG2_E))
        es = columns_of(e)
        out = out + (
            moments[4 * j] + sum_of(es),
            moments[4 * j + 1] + sum_of_products(es, xs),
            moments[4 * j + 2] + sum_of_products(es, squares),
            moments[4 * j + 3] + sum_of_products(es, cubes),
        )
    return out


@triton.jit
def _mix_max(student_side, teacher_side, mix_side, moments, MIX: tl.constexpr):
    """Return the maximum of w (t - teacher_max) + (s - student_max), with the maxima of this part.

    It is -inf without columns, and NaN for a row with NaN.
    """
    total = tl.sum(moments[0] + moments[1], 0)
    if MIX == _BOTH:
        height = (mix_side[0].to(tl.float64) - student_side[0].to(tl.float64)).to(tl.float32)
    else:
        height = total * 0.0
    height = tl.where(mix_side[0] > _NOTHING, height, float("-inf"))
    return tl.where(total == total, height, total)


@triton.jit
def _store_side(out, side, first_column):
    """Write maximum, tail, first and argmax of one side; a row with NaN has no maximum."""
    tail, first = tl.sum(side[2], 0), tl.sum(side[3], 0)
    maximum = tl.where(side[0] > _NOTHING, side[0], float("-inf"))
    tl.store(out, tl.where(tail + first == tail + first, maximum, tail + first))
    tl.store(out + 1, tail)
    tl.store(out + 2, first)
    tl.store(out + 3, (side[1] + first_column).to(tl.float32))


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
    """Write one row of ``jsd_and_renyi_passes.jsd_pass``."""
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


@triton.jit(do_not_specialize=["num_rows", "num_columns", "blocks_per_part"])
def renyi_pass_kernel(
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
    rest_of_order,
    MIX: tl.constexpr,
    FORWARD: tl.constexpr,
    LANES: tl.constexpr,
    VEC: tl.constexpr,
    PACKED: tl.constexpr,
):
    """Write one row of ``jsd_and_renyi_passes.renyi_pass``.

    rest_of_order: 1 - alpha.  FORWARD: whether the divergence is D(q || p).
    """
    row, part = tl.program_id(0).to(tl.int64), tl.program_id(1)
    constants = _constants(row, student_max, teacher_max, mix_max, student_log_sum, beta, log_sum)
    student += row * student_stride
    teacher += row * teacher_stride
    BLOCK: tl.constexpr = LANES * VEC
    begin = part * blocks_per_part * BLOCK
    end = tl.minimum(begin + blocks_per_part * BLOCK, num_columns)
    lane = tl.arange(0, LANES)
    small, total, top = tl.zeros([LANES], tl.float32), tl.zeros([LANES], tl.float32), tl.full([], _NOTHING, tl.float32)
    next_s, next_t = fetched(student, lane, begin, end, VEC, PACKED), fetched(teacher, lane, begin, end, VEC, PACKED)
    for start in range(begin, end, BLOCK):
        s, t = numbers_of(next_s, student, lane, VEC, PACKED), numbers_of(next_t, teacher, lane, VEC, PACKED)
        next_s = fetched(student, lane, start + BLOCK, end, VEC, PACKED)
        next_t = fetched(teacher, lane, start + BLOCK, end, VEC, PACKED)
        s, t = with_end(s, student, lane, start, end, VEC), with_end(t, teacher, lane, start, end, VEC)
        y, x = _shifted(s, t, constants, mix_weight, MIX)
        terms, height = _renyi_terms(y, x, constants, rest_of_order, FORWARD)
        small += sum_of(columns_of(terms))
        higher = tl.maximum(top, _highest(height))
        total = total * exponential(top - higher) + sum_of(columns_of(exponential(height - higher)))
        top = higher
    out = sums + (part.to(tl.int64) * num_rows + row) * 2
    tl.store(out, tl.sum(small, 0))
    tl.store(out + 1, tl.log(tl.sum(total, 0)) + top)


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
    forward_shares,
    out,
    student_stride,
    teacher_stride,
    out_stride,
    kl_stride,
    grad_loss_stride,
    num_columns,
    mix_weight,
    jsd_lambda,
    teacher_power,
    rest_of_order,
    renyi_factor,
    MIX: tl.constexpr,
    KIND: tl.constexpr,
    WITH_LOG_PROB: tl.constexpr,
    WITH_FORWARD: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """Write one block of ``shard_sums.write_gradient``.

    WITH_LOG_PROB: whether the log-prob of the response token has a gradient; else its two operands are not read.
    WITH_FORWARD: whether forward KL is added to reverse KL with the weights ``forward_shares``; else they are not read.
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
        if WITH_FORWARD:
            gradient -= tl.load(forward_shares + row) * _q_minus_p(p, q, d)
    elif KIND == _RENYI:
        log_p = y - constants[3]
        # kl_value - kl_value is NaN where the divergence is infinite, else 0
        log_ratio = teacher_power * d + (rest_of_order * kl_value + (kl_value - kl_value))
        gradient = renyi_factor * _q_minus_p(p, exponential(log_p + log_ratio), log_ratio)
        gradient = tl.where((y <= _FLOOR) & (x <= _FLOOR), 0.0, gradient)
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
def _renyi_terms(y, x, constants, rest_of_order, FORWARD: tl.constexpr):
    """Return the terms of Z - 1 and the log of those of Z, see `divergence.renyi_sums`."""
    p, q, d = _ratio(y, x, constants)
    log_p, log_q = y - constants[3], x * constants[4] - constants[5]
    no_p, no_q = y <= _FLOOR, x <= _FLOOR
    if FORWARD:
        first, f, g, d, no_first, no_other = log_q, q, p, -d, no_q, no_p
    else:
        first, f, g, no_first, no_other = log_p, p, q, no_p, no_q
    alone = no_first | no_other
    d = tl.where(alone, 0.0, d)
    height = tl.where(no_other, tl.where(rest_of_order < 0, -_FAR, _FAR), first + rest_of_order * d)
    height = tl.where(no_first, _FAR, height)
    both = exponential(height)
    terms = _q_minus_p(f, both, rest_of_order * d) - rest_of_order * _q_minus_p(f, g, d)
    return tl.where(alone, (both - f) - rest_of_order * (g - f), terms), height


@triton.jit
def _log_mixture_over_larger(d, jsd_lambda):
    """Return log(M / max(p, q)) with M = lam q + (1 - lam) p."""
    weight_of_smaller = tl.where(d > 0, 1 - jsd_lambda, jsd_lambda)
    return log_one_plus(exp_minus_one(-tl.abs(d)) * weight_of_smaller)
