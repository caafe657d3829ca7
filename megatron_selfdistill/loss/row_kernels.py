# Copyright (c) 2026 the megatron_selfdistill authors. Apache-2.0.
# mypy: disable-error-code="assignment, misc"
# ruff: noqa: RUF005
"""The Triton kernels between and after the passes, a program for all parts of a few rows: see ``solve_kernels``.

First pass -> solve_kernel -> second pass -> finish_kernel; or first pass -> one_pass_kernel, under ``Grid.one_pass``.
"""

from __future__ import annotations

import triton
import triton.language as tl

from megatron_selfdistill.loss import target
from megatron_selfdistill.loss.divergence import FLOOR
from megatron_selfdistill.loss.entropy_kernels import (
    cubic,
    mismatch,
    nothing_yet,
    on_grid,
    polished,
    with_point,
)
from megatron_selfdistill.loss.kernel_math import as_float32, at_least, exp_minus_one_64, is_finite
from megatron_selfdistill.loss.merge_kernels import (
    column,
    merged_mean_y,
    merged_moments,
    merged_rows,
    merged_second,
    merged_student_mean,
    mixed,
    rows_and_parts,
    token_logits,
)

_FLOOR = tl.constexpr(FLOOR)
_MIN_ENTROPY, _MATCH_TOLERANCE = tl.constexpr(target.MIN_ENTROPY), tl.constexpr(target.MATCH_TOLERANCE)
_MATCHED, _CAPPED = tl.constexpr(int(target.Status.MATCHED)), tl.constexpr(int(target.Status.CAPPED))
_OUT_OF_RANGE = tl.constexpr(int(target.Status.OUT_OF_RANGE))
_UNDETERMINED, _GIVEN = tl.constexpr(int(target.Status.UNDETERMINED)), tl.constexpr(int(target.Status.GIVEN))


@triton.jit(do_not_specialize=["num_rows", "num_parts"])
def solve_kernel(
    gathered,
    betas,
    state,
    shifts,
    constants,
    grid_entropies,
    num_rows,
    num_parts,
    mix_weight,
    MIX: tl.constexpr,
    J: tl.constexpr,
    NUM_GRID: tl.constexpr,
    FAVOURED: tl.constexpr,
    GIVEN: tl.constexpr,
    ROWS: tl.constexpr,
    PARTS: tl.constexpr,
):
    """``gathered``: [parts, T, 14 + 4 J], the columns of `row_sums.first_pass`."""
    rows, inside, place, there = rows_and_parts(num_rows, num_parts, ROWS, PARTS)
    at = gathered + place * (14 + 4 * J)
    student, teacher, mix_max, shift, only_student, only_mix, max_entropy = merged_rows(at, there, mix_weight, MIX)
    tl.store(shifts + place, shift, mask=there)
    solved = nothing_yet(max_entropy, 8)
    for j in range(J):
        beta = tl.load(betas + j).to(tl.float64)
        here = merged_moments(at + 12 + 4 * j, there, shift, beta)
        _store_entropy(grid_entropies, here, beta, j, rows, inside, NUM_GRID)
        point = (beta + tl.zeros_like(max_entropy),) + here + mismatch(here, beta, student[2], max_entropy)
        solved = with_point(solved, point, student[2], tl.abs(j - FAVOURED), j == 0)
    beta, log_sum, lowest, highest, polish, _ = on_grid(solved, student[2], GIVEN)
    log_sum = as_float32(log_sum)
    values = (student[0], teacher[0], mix_max, student[1], beta, log_sum)
    for i in tl.static_range(6):
        tl.store(constants + i * num_rows + rows, values[i].to(tl.float32), mask=inside)
    student_token, teacher_token = token_logits(at + 12 + 4 * J, there)
    values = values + (teacher[1], student[2], teacher[2], max_entropy, lowest, highest, student_token, teacher_token)
    values = values + (polish.to(tl.float64), only_student, only_mix, _agree(student, teacher))
    for i in tl.static_range(18):
        tl.store(state + i * num_rows + rows, values[i], mask=inside)


@triton.jit(do_not_specialize=["num_rows", "num_parts", "vocab_size"])
def one_pass_kernel(
    gathered,
    tokens,
    betas,
    grid_entropies,
    results,
    constants,
    exact,
    statuses,
    agreements,
    num_rows,
    num_parts,
    vocab_size,
    mix_weight,
    MIX: tl.constexpr,
    J: tl.constexpr,
    NUM_GRID: tl.constexpr,
    FAVOURED: tl.constexpr,
    GIVEN: tl.constexpr,
    LOWEST_IS_BOUND: tl.constexpr,
    HAS_TOKENS: tl.constexpr,
    WITH_FORWARD: tl.constexpr,
    NUM_COLUMNS: tl.constexpr,
    ROWS: tl.constexpr,
    PARTS: tl.constexpr,
):
    """``gathered``: [parts, T, NUM_COLUMNS], the columns of `row_sums.first_pass` under ``Grid.one_pass``."""
    rows, inside, place, there = rows_and_parts(num_rows, num_parts, ROWS, PARTS)
    at = gathered + place * NUM_COLUMNS
    student, teacher, mix_max, shift, only_student, only_mix, max_entropy = merged_rows(at, there, mix_weight, MIX)
    solved = nothing_yet(max_entropy, 10)
    for j in range(J):
        beta = tl.load(betas + j).to(tl.float64)
        moments = at + 12 + 4 * j
        here = merged_moments(moments, there, shift, beta)
        _store_entropy(grid_entropies, here, beta, j, rows, inside, NUM_GRID)
        point = (beta + tl.zeros_like(max_entropy),) + here + mismatch(here, beta, student[2], max_entropy)
        if WITH_FORWARD:
            point += merged_mean_y(at, at + 13 + 4 * J + 2 * j, moments, there, student[0], shift, beta, here)
        else:
            point += (tl.zeros_like(max_entropy), tl.zeros_like(max_entropy))
        solved = with_point(solved, point, student[2], tl.abs(j - FAVOURED), j == 0)
    beta, log_sum, _lowest, _highest, between, point = on_grid(solved, student[2], GIVEN)
    # Inside a cell H(q) is what was solved for, and E_q[y] is a cubic in E_q[x].
    entropy = tl.where(between, at_least(student[2], _MIN_ENTROPY), point[1] - point[0] * point[2])
    mean_x = merged_student_mean(at, at + 12 + 4 * J, there, student[0], shift)
    reverse_kl, forward_kl = log_sum - beta * mean_x - student[2], tl.zeros_like(mean_x)
    if WITH_FORWARD:
        left, right = solved[2], solved[3]
        slopes = left[9] / left[3], right[9] / right[3]
        inner = cubic(left[8], slopes[0], right[8], slopes[1], left[2], right[2], (log_sum - entropy) / beta)
        forward_kl = student[1] - tl.where(between, inner, point[4]) - entropy

    weight = tl.full([], mix_weight, tl.float64)
    logits = token_logits(at + NUM_COLUMNS - 2, there)
    log_probs = _log_probs(logits, student, teacher, mix_max, beta, log_sum, weight, MIX)
    _store_log_probs(results, log_probs, tokens, rows, inside, num_rows, vocab_size, HAS_TOKENS)
    kls = _infinite_where(only_student, reverse_kl), _infinite_where(only_mix, forward_kl)
    _store_numbers(results, kls + (student[2], teacher[2], at_least(entropy, 0.0)), rows, inside, num_rows)
    height = mixed(student[0], teacher[0], weight, MIX) + mix_max
    _store_exact(exact, constants, student, teacher, mix_max, beta, log_sum, height, rows, inside, num_rows)
    status = _status(betas, beta, student[2], entropy, NUM_GRID, GIVEN, LOWEST_IS_BOUND)
    tl.store(statuses + rows, status.to(tl.int64), mask=inside)
    tl.store(agreements + rows, _agree(student, teacher).to(tl.uint8), mask=inside)


@triton.jit
def _agree(student, teacher):
    return ((student[3] == teacher[3]) & is_finite(student[3])).to(tl.float64)


@triton.jit
def _store_entropy(grid_entropies, here, beta, j, rows, inside, NUM_GRID: tl.constexpr):
    entropy = here[0] - beta * here[1]
    tl.store(grid_entropies + rows * NUM_GRID + j, entropy.to(tl.float32), mask=inside & (j < NUM_GRID))


@triton.jit(do_not_specialize=["num_rows", "num_parts", "vocab_size"])
def finish_kernel(
    state,
    shifts,
    gathered,
    tokens,
    betas,
    results,
    constants,
    exact,
    statuses,
    agreements,
    num_rows,
    num_parts,
    vocab_size,
    mix_weight,
    MIX: tl.constexpr,
    NUM_GRID: tl.constexpr,
    GIVEN: tl.constexpr,
    LOWEST_IS_BOUND: tl.constexpr,
    HAS_TOKENS: tl.constexpr,
    NUM_COLUMNS: tl.constexpr,
    ROWS: tl.constexpr,
    PARTS: tl.constexpr,
):
    """``gathered``: [parts, T, NUM_COLUMNS], the columns of `row_sums.second_pass`."""
    rows, inside, place, there = rows_and_parts(num_rows, num_parts, ROWS, PARTS)
    known = ()
    for i in tl.static_range(18):
        known = known + (tl.load(state + i * num_rows + rows, mask=inside, other=0.0),)
    student_max, teacher_max, mix_max, student_log_sum, old_beta, assumed = known[:6]
    teacher_log_sum, student_entropy, teacher_entropy, max_entropy, lowest, highest = known[6:12]
    student_token, teacher_token, polish, only_student, only_mix, agree = known[12:18]
    part = ()
    for i in tl.static_range(NUM_COLUMNS):
        part = part + (tl.sum(column(gathered + place * NUM_COLUMNS + i, there, 0.0), 1),)

    shift = tl.load(shifts + place, mask=there, other=_FLOOR)
    here, fourth = merged_second(part, shift, old_beta, assumed)
    step, log_sum, mean = polished(here, fourth, old_beta, lowest, highest, polish > 0, student_entropy, max_entropy)
    beta = old_beta + step
    entropy = log_sum - beta * mean
    log_ratio = here[0] - assumed
    reverse_kl = part[5] - exp_minus_one_64(log_ratio) + log_ratio + (log_sum - here[0]) - step * part[6]
    forward_kl = tl.zeros_like(reverse_kl)
    if NUM_COLUMNS == 12:
        forward_kl = (part[7] + exp_minus_one_64(log_ratio)) * tl.exp(-log_ratio) - log_ratio
        forward_kl += here[0] - old_beta * here[1] - entropy - _taylor_of_mean_y(here, part, log_ratio, step)
    entropy = at_least(entropy, 0.0)

    student, teacher = (student_max, student_log_sum), (teacher_max, teacher_log_sum)
    weight = tl.full([], mix_weight, tl.float64)
    log_probs = _log_probs((student_token, teacher_token), student, teacher, mix_max, beta, log_sum, weight, MIX)
    _store_log_probs(results, log_probs, tokens, rows, inside, num_rows, vocab_size, HAS_TOKENS)
    kls = _infinite_where(only_student, reverse_kl), _infinite_where(only_mix, forward_kl)
    _store_numbers(results, kls + (student_entropy, teacher_entropy, entropy), rows, inside, num_rows)
    height = mixed(student_max, teacher_max, weight, MIX) + mix_max
    _store_exact(exact, constants, student, teacher, mix_max, beta, log_sum, height, rows, inside, num_rows)
    status = _status(betas, beta, student_entropy, entropy, NUM_GRID, GIVEN, LOWEST_IS_BOUND)
    tl.store(statuses + rows, status.to(tl.int64), mask=inside)
    tl.store(agreements + rows, agree.to(tl.uint8), mask=inside)


@triton.jit
def _log_probs(token_logits, student, teacher, mix_max, beta, log_sum, weight, MIX: tl.constexpr):
    """`Rows.log_probs`; student and teacher begin with maximum and log_sum."""
    y, z = token_logits[0] - student[0], token_logits[1] - teacher[0]
    x = mixed(y, z, weight, MIX) - mix_max
    return y - student[1], z - teacher[1], beta * x - log_sum


@triton.jit
def _store_log_probs(results, log_probs, tokens, rows, inside, num_rows, vocab_size, HAS_TOKENS: tl.constexpr):
    if HAS_TOKENS:
        token = tl.load(tokens + rows, mask=inside, other=0)
        valid = (token >= 0) & (token < vocab_size)
    else:
        valid = rows < 0
    for i in tl.static_range(3):
        value = tl.where(valid, log_probs[i], float("nan"))
        tl.store(results + (5 + i) * num_rows + rows, value.to(tl.float32), mask=inside)


@triton.jit
def _store_numbers(results, values, rows, inside, num_rows):
    """The first of RESULTS."""
    for i in tl.static_range(5):
        tl.store(results + i * num_rows + rows, values[i].to(tl.float32), mask=inside)


@triton.jit
def _store_exact(exact, constants, student, teacher, mix_max, beta, log_sum, height, rows, inside, num_rows):
    values = (student[0], teacher[0], mix_max, student[1], beta, log_sum)
    for i in tl.static_range(6):
        tl.store(constants + i * num_rows + rows, values[i].to(tl.float32), mask=inside)
    tl.store(exact + rows, beta, mask=inside)
    tl.store(exact + num_rows + rows, beta * height + log_sum, mask=inside)


@triton.jit
def _infinite_where(one_sided, kl):
    kl = at_least(kl, 0.0)
    return tl.where((one_sided > 0) & (kl == kl), float("inf"), kl)


@triton.jit
def _taylor_of_mean_y(here, part, log_ratio, step):
    """`row_statistics._taylor_of_mean_y`."""
    scale, mean, mean2 = tl.exp(-log_ratio), here[1], here[1] * here[1]
    y0, y1, y2, y3 = part[8] * scale, part[9] * scale, part[10] * scale, part[11] * scale
    first = y1 - mean * y0
    second = y2 - 2 * mean * y1 + mean2 * y0 - y0 * here[2]
    third = y3 - 3 * mean * y2 + 3 * mean2 * y1 - mean2 * mean * y0 - y0 * here[3] - 3 * here[2] * first
    return step * (first + step * (second / 2 + step * third / 6))


@triton.jit
def _status(
    betas,
    beta,
    student_entropy,
    entropy,
    NUM_GRID: tl.constexpr,
    GIVEN: tl.constexpr,
    LOWEST_IS_BOUND: tl.constexpr,
):
    """`target.token_status`, or GIVEN."""
    status = tl.zeros_like(beta).to(tl.int32) + (_GIVEN if GIVEN else _MATCHED)
    if not GIVEN:
        low, high = tl.load(betas).to(tl.float64), tl.load(betas + NUM_GRID - 1).to(tl.float64)
        apart = tl.abs(entropy - student_entropy) > _MATCH_TOLERANCE
        status = tl.where(apart & (beta <= low), _CAPPED if LOWEST_IS_BOUND else _OUT_OF_RANGE, status)
        status = tl.where(apart & (beta >= high), _OUT_OF_RANGE, status)
        determined = (student_entropy >= _MIN_ENTROPY) & is_finite(beta)
        status = tl.where(determined, status, _UNDETERMINED)
    return status
