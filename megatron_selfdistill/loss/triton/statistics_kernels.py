# Copyright (c) 2026 the megatron_selfdistill authors. Apache-2.0.
# mypy: disable-error-code="assignment, misc"
# ruff: noqa: RUF005
"""The Triton kernels between and after the passes.

Twin: `sharded/token_statistics.py`.
A program has all parts of a few tokens; solver_launches.py launches the kernels in this order:
first pass -> solve_kernel -> second pass -> finish_kernel -> third pass -> finish_kernel, where the last two work on
tokens that are UNCONVERGED.
"""

from __future__ import annotations

import triton
import triton.language as tl

from megatron_selfdistill.loss.divergence import FLOOR
from megatron_selfdistill.loss.status import MATCH_TOLERANCE, MIN_ENTROPY, Status
from megatron_selfdistill.loss.triton.kernel_math import as_float32, at_least, exp_minus_one_64, is_finite
from megatron_selfdistill.loss.triton.merge_kernels import (
    column,
    merged_moments,
    merged_rows,
    merged_second,
    mixed,
    rows_and_parts,
    token_logits,
)
from megatron_selfdistill.loss.triton.solver_kernels import entropy_of, nothing_yet, on_grid, refined, with_point

NUM_STATE = tl.constexpr(27)
"""The numbers of a token that ``finish_kernel`` receives, float64: 6 constants, 2 points of 5 numbers, and 11 that
stay."""
_FLOOR = tl.constexpr(FLOOR)
_UNCONVERGED = tl.constexpr(int(Status.UNCONVERGED))
_MIN_ENTROPY, _MATCH_TOLERANCE = tl.constexpr(MIN_ENTROPY), tl.constexpr(MATCH_TOLERANCE)
_MATCHED, _CAPPED = tl.constexpr(int(Status.MATCHED)), tl.constexpr(int(Status.CAPPED))
_OUT_OF_RANGE = tl.constexpr(int(Status.OUT_OF_RANGE))
_UNDETERMINED, _GIVEN = tl.constexpr(int(Status.UNDETERMINED)), tl.constexpr(int(Status.GIVEN))


@triton.jit(do_not_specialize=["num_rows", "num_parts"])
def solve_kernel(
    gathered,
    reference_entropies,
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
    MATCH_REFERENCE: tl.constexpr,
    ROWS: tl.constexpr,
    PARTS: tl.constexpr,
):
    """Compute `token_statistics.solve_tokens` of a few tokens.

    gathered: [parts, T, 14 + 4 J], the columns of `shard_sums.first_pass`.
    reference_entropies: [T] the entropies to match with MATCH_REFERENCE, otherwise not read.
    """
    rows, inside, place, there = rows_and_parts(num_rows, num_parts, ROWS, PARTS)
    at = gathered + place * (14 + 4 * J)
    student, teacher, mix_max, shift, only_student, only_mix, max_entropy = merged_rows(at, there, mix_weight, MIX)
    tl.store(shifts + place, shift, mask=there)
    wanted = student[2]
    if MATCH_REFERENCE:
        wanted = tl.load(reference_entropies + rows, mask=inside, other=0.0).to(tl.float64)
    solved = nothing_yet(max_entropy)
    for j in range(J):
        beta = tl.load(betas + j).to(tl.float64)
        here = merged_moments(at + 12 + 4 * j, there, shift, beta)
        entropy = entropy_of(here).to(tl.float32)
        tl.store(grid_entropies + rows * NUM_GRID + j, entropy, mask=inside & (j < NUM_GRID))
        solved = with_point(solved, here, wanted, tl.abs(j - FAVOURED), j == 0)
    beta, log_sum, left, right, sought = on_grid(solved, wanted, max_entropy, GIVEN)
    log_sum = as_float32(log_sum)
    values = (student[0], teacher[0], mix_max, student[1], beta, log_sum)
    for i in tl.static_range(6):
        tl.store(constants + i * num_rows + rows, values[i].to(tl.float32), mask=inside)
    student_token, teacher_token = token_logits(at + 12 + 4 * J, there)
    values = values + left + right + (sought.to(tl.float64), teacher[1], student[2], teacher[2], max_entropy)
    values = values + (student_token, teacher_token, only_student, only_mix, _agree(student, teacher), wanted)
    for i in tl.static_range(NUM_STATE):
        tl.store(state + i * num_rows + rows, values[i], mask=inside)


@triton.jit
def _agree(student, teacher):
    """Return 1 where student and teacher have the same argmax, else 0."""
    return ((student[3] == teacher[3]) & is_finite(student[3])).to(tl.float64)


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
    SOME_ROWS: tl.constexpr,
    NUM_COLUMNS: tl.constexpr,
    ROWS: tl.constexpr,
    PARTS: tl.constexpr,
):
    """Compute `token_statistics.finish_tokens` of some tokens; write the next bracket into ``state``.

    gathered: [parts, T, NUM_COLUMNS], the columns of `shard_sums.second_pass`.
    SOME_ROWS: write only the tokens that are UNCONVERGED.
    """
    rows, inside, place, there = rows_and_parts(num_rows, num_parts, ROWS, PARTS)
    if SOME_ROWS:
        inside = inside & (tl.load(statuses + rows, mask=inside, other=0) == _UNCONVERGED)
        there = there & inside[:, None]
    known = ()
    for i in tl.static_range(NUM_STATE):
        known = known + (tl.load(state + i * num_rows + rows, mask=inside, other=0.0),)
    student_max, teacher_max, mix_max, student_log_sum, old_beta, assumed = known[:6]
    left, right, sought = known[6:11], known[11:16], known[16] > 0
    teacher_log_sum, student_entropy, teacher_entropy, max_entropy = known[17:21]
    student_token, teacher_token, only_student, only_mix, agree = known[21:26]
    wanted = known[26]
    part = ()
    for i in tl.static_range(NUM_COLUMNS):
        part = part + (tl.sum(column(gathered + place * NUM_COLUMNS + i, there, 0.0), 1),)

    shift = tl.load(shifts + place, mask=there, other=_FLOOR)
    here = merged_second(part, shift, old_beta, assumed)
    moved = refined(here, left, right, sought, wanted, max_entropy)
    beta, log_sum, entropy, left, right, converged = moved
    step, log_ratio = beta - old_beta, here[1] - assumed
    reverse_kl = part[4] - exp_minus_one_64(log_ratio) + log_ratio + (log_sum - here[1]) - step * part[5]
    forward_kl = tl.zeros_like(reverse_kl)
    if NUM_COLUMNS == 11:
        forward_kl = (part[6] + exp_minus_one_64(log_ratio)) * tl.exp(-log_ratio) - log_ratio
        forward_kl += entropy_of(here) - entropy - _taylor_of_mean_y(here, part, log_ratio, step)
    entropy = at_least(entropy, 0.0)

    student, teacher = (student_max, student_log_sum), (teacher_max, teacher_log_sum)
    weight = tl.full([], mix_weight, tl.float64)
    log_probs = _log_probs((student_token, teacher_token), student, teacher, mix_max, beta, log_sum, weight, MIX)
    _store_log_probs(results, log_probs, tokens, rows, inside, num_rows, vocab_size, HAS_TOKENS)
    kls = _infinite_where(only_student, reverse_kl), _infinite_where(only_mix, forward_kl)
    _store_numbers(results, kls + (student_entropy, teacher_entropy, entropy), rows, inside, num_rows)
    height = mixed(student_max, teacher_max, weight, MIX) + mix_max
    _store_exact(exact, constants, student, teacher, mix_max, beta, log_sum, height, rows, inside, num_rows)
    status = _status(betas, beta, wanted, entropy, converged, NUM_GRID, GIVEN, LOWEST_IS_BOUND)
    tl.store(statuses + rows, status.to(tl.int64), mask=inside)
    tl.store(agreements + rows, agree.to(tl.uint8), mask=inside)
    if not SOME_ROWS and not GIVEN:
        values = (beta, as_float32(log_sum)) + left + right
        for i in tl.static_range(12):
            tl.store(state + (4 + i) * num_rows + rows, values[i], mask=inside)


@triton.jit
def _log_probs(token_logits, student, teacher, mix_max, beta, log_sum, weight, MIX: tl.constexpr):
    """Compute `MergedSums.log_probs`; ``student`` and ``teacher`` begin with maximum and log_sum."""
    y, z = token_logits[0] - student[0], token_logits[1] - teacher[0]
    x = mixed(y, z, weight, MIX) - mix_max
    return y - student[1], z - teacher[1], beta * x - log_sum


@triton.jit
def _store_log_probs(results, log_probs, tokens, rows, inside, num_rows, vocab_size, HAS_TOKENS: tl.constexpr):
    """Write the three log-probs of RESULTS; NaN without a valid response token."""
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
    """Write the first five of RESULTS."""
    for i in tl.static_range(5):
        tl.store(results + i * num_rows + rows, values[i].to(tl.float32), mask=inside)


@triton.jit
def _store_exact(exact, constants, student, teacher, mix_max, beta, log_sum, height, rows, inside, num_rows):
    """Write the constants for the next pass in float32, and beta and the log-normaliser in float64."""
    values = (student[0], teacher[0], mix_max, student[1], beta, log_sum)
    for i in tl.static_range(6):
        tl.store(constants + i * num_rows + rows, values[i].to(tl.float32), mask=inside)
    tl.store(exact + rows, beta, mask=inside)
    tl.store(exact + num_rows + rows, beta * height + log_sum, mask=inside)


@triton.jit
def _infinite_where(one_sided, kl):
    """Compute `token_statistics._infinite_where` of a divergence that is raised to 0 at least."""
    kl = at_least(kl, 0.0)
    return tl.where((one_sided > 0) & (kl == kl), float("inf"), kl)


@triton.jit
def _taylor_of_mean_y(here, part, log_ratio, step):
    """Compute `token_statistics._taylor_of_mean_y`."""
    scale, mean, mean2 = tl.exp(-log_ratio), here[2], here[2] * here[2]
    y0, y1, y2, y3 = part[7] * scale, part[8] * scale, part[9] * scale, part[10] * scale
    first = y1 - mean * y0
    second = y2 - 2 * mean * y1 + mean2 * y0 - y0 * here[3]
    third = y3 - 3 * mean * y2 + 3 * mean2 * y1 - mean2 * mean * y0 - y0 * here[4] - 3 * here[3] * first
    return step * (first + step * (second / 2 + step * third / 6))


@triton.jit
def _status(
    betas,
    beta,
    wanted,
    entropy,
    converged,
    NUM_GRID: tl.constexpr,
    GIVEN: tl.constexpr,
    LOWEST_IS_BOUND: tl.constexpr,
):
    """Compute `token_status`, or GIVEN where the rule gives beta."""
    status = tl.zeros_like(beta).to(tl.int32) + (_GIVEN if GIVEN else _MATCHED)
    if not GIVEN:
        low, high = tl.load(betas).to(tl.float64), tl.load(betas + NUM_GRID - 1).to(tl.float64)
        apart = tl.abs(entropy - wanted) > _MATCH_TOLERANCE
        status = tl.where(apart & (beta <= low), _CAPPED if LOWEST_IS_BOUND else _OUT_OF_RANGE, status)
        status = tl.where(apart & (beta >= high), _OUT_OF_RANGE, status)
        status = tl.where(converged, status, _UNCONVERGED)
        determined = (wanted >= _MIN_ENTROPY) & is_finite(beta)
        status = tl.where(determined, status, _UNDETERMINED)
    return status
