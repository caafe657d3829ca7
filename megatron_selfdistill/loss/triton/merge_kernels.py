# Copyright (c) 2026 the megatron_selfdistill authors. Apache-2.0.
"""The merge of the parts of rows in the solving kernels, in float64, [tokens, parts] at a time.

Twin: `sharded/token_statistics.py`.
A part without columns, and a part beyond the last one, has maximum -inf and sums 0, which add nothing.
"""

from __future__ import annotations

import triton
import triton.language as tl

from megatron_selfdistill.loss.divergence import FLOOR
from megatron_selfdistill.loss.triton.first_pass_kernel import BOTH, STUDENT_ONLY
from megatron_selfdistill.loss.triton.kernel_math import as_float32, at_least, highest_of, log_one_plus_64
from megatron_selfdistill.loss.triton.solver_kernels import cumulants

_FLOOR = tl.constexpr(FLOOR)
_BOTH, _STUDENT_ONLY = tl.constexpr(BOTH), tl.constexpr(STUDENT_ONLY)


@triton.jit
def rows_and_parts(num_rows, num_parts, ROWS: tl.constexpr, PARTS: tl.constexpr):
    """Return the tokens of this program, and which of them exist; and the places [ROWS, PARTS] of their parts.

    The places are offsets into [parts, T]; the last result says which places exist.
    """
    rows = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    parts = tl.arange(0, PARTS)[None, :]
    inside = rows < num_rows
    return rows, inside, parts * num_rows + rows[:, None], inside[:, None] & (parts < num_parts)


@triton.jit
def merged_rows(at, there, mix_weight, MIX: tl.constexpr):
    """Compute `MergedSums.merge` except for the moments.

    student, teacher: maximum, log_sum, entropy, argmax.
    """
    weight = tl.full([], mix_weight, tl.float64)
    student_max, student_log_sum, student_entropy, student_argmax, local_student = merged_softmax(at, there)
    teacher_max, teacher_log_sum, teacher_entropy, teacher_argmax, local_teacher = merged_softmax(at + 4, there)
    local_max = mixed(local_student, local_teacher, weight, MIX) + column(at + 8, there, float("-inf"))
    reference = mixed(student_max, teacher_max, weight, MIX)
    mix_max = as_float32(highest_of(local_max) - reference)
    shift = at_least(local_max - (reference + mix_max)[:, None], _FLOOR)
    num_student = tl.sum(column(at + 9, there, 0.0), 1)
    num_mix = tl.sum(column(at + 10, there, 0.0), 1)
    num_both = tl.sum(column(at + 11, there, 0.0), 1)
    student = (student_max, student_log_sum, student_entropy, student_argmax)
    teacher = (teacher_max, teacher_log_sum, teacher_entropy, teacher_argmax)
    only_student, only_mix = (num_student > num_both).to(tl.float64), (num_mix > num_both).to(tl.float64)
    return student, teacher, mix_max, shift, only_student, only_mix, tl.log(num_mix)


@triton.jit
def merged_softmax(at, there):
    """Compute `Softmax.merge`: maximum, log_sum, entropy, argmax.

    The last result is the parts' maxima, 0 for a part without columns.
    """
    maximum = column(at, there, float("-inf"))
    total = 1 + column(at + 1, there, 0.0)
    first, argmax = column(at + 2, there, 0.0), column(at + 3, there, float("inf"))
    top = highest_of(maximum)
    shift = at_least(maximum - top[:, None], _FLOOR)
    weight = tl.exp(shift)
    tail = tl.sum(weight * total, 1) - 1
    log_sum = log_one_plus_64(tail)
    entropy = log_sum - tl.sum(weight * (first + shift * total), 1) / (1 + tail)
    lowest = tl.min(tl.where(maximum == top[:, None], argmax, float("inf")), 1)
    local = tl.where(maximum == float("-inf"), 0.0, maximum)
    return top, log_sum, at_least(entropy, 0.0), lowest, local


@triton.jit
def merged_moments(at, there, shift, beta):
    """Compute `token_statistics._merge_moments`."""
    s0 = 1 + column(at, there, 0.0)
    s1, s2, s3 = column(at + 1, there, 0.0), column(at + 2, there, 0.0), column(at + 3, there, 0.0)
    weight = tl.exp(beta * shift)
    return cumulants(
        beta,
        tl.sum(weight * s0, 1) - 1,
        tl.sum(weight * (s1 + shift * s0), 1),
        tl.sum(weight * (s2 + shift * (2 * s1 + shift * s0)), 1),
        tl.sum(weight * (s3 + shift * (3 * s2 + shift * (3 * s1 + shift * s0))), 1),
    )


@triton.jit
def merged_second(part, shift, beta, assumed):
    """Return the cumulants of x at beta, from the sums of a pass and each part's largest column."""
    tops, scale = tl.exp(beta[:, None] * shift), tl.exp(assumed)
    return cumulants(
        beta,
        scale * part[0] + tl.sum(tops, 1) - 1,
        scale * part[1] + tl.sum(tops * shift, 1),
        scale * part[2] + tl.sum(tops * shift * shift, 1),
        scale * part[3] + tl.sum(tops * shift * shift * shift, 1),
    )


@triton.jit
def token_logits(at, there):
    """Return the student's and the teacher's logit of the response token."""
    return tl.sum(column(at, there, 0.0), 1), tl.sum(column(at + 1, there, 0.0), 1)


@triton.jit
def mixed(student, teacher, weight, MIX: tl.constexpr):
    """Compute `mixed_logits`."""
    if MIX == _BOTH:
        mixed = weight * teacher + student
    elif MIX == _STUDENT_ONLY:
        mixed = student
    else:
        mixed = teacher
    return mixed


@triton.jit
def column(pointer, there, other):
    """Return one number of each part as float64, ``other`` where there is none."""
    return tl.load(pointer, mask=there, other=other).to(tl.float64)
