# Copyright (c) 2026 the megatron_selfdistill authors. Apache-2.0.
# mypy: disable-error-code="assignment, misc"
# ruff: noqa: RUF005
"""The Triton kernels between and after the passes, the formulas of the solver, and the merge of the parts of rows.

Twin: `sharded/token_statistics.py`.
A program has all parts of a few tokens; solver_launches.py launches the kernels in this order:
first pass -> solve_kernel -> second pass -> finish_kernel -> third pass -> finish_kernel, where the last two work on
tokens that are UNCONVERGED.

All arithmetic is float64.  The solver has one token per element, and its point is a tuple of the fields of
`token_statistics.Cumulants`: (beta, log_sum, mean, variance, third).  The merge works on [tokens, parts] at a time: a
part without columns, and a part beyond the last one, has maximum -inf and sums 0, which add nothing.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from megatron_selfdistill.kernels.kernel_math import (
    as_float32,
    at_least,
    at_most,
    exp_minus_one_64,
    highest_of,
    is_finite,
    log_one_plus_64,
)
from megatron_selfdistill.kernels.pass_kernels import BOTH, STUDENT_ONLY
from megatron_selfdistill.loss.divergence import FLOOR
from megatron_selfdistill.loss.sharded import token_statistics
from megatron_selfdistill.loss.target import MATCH_TOLERANCE, MIN_ENTROPY, Status

_LEAST_ENTROPY = tl.constexpr(token_statistics.LEAST_ENTROPY)
_LEAST_DEFICIT = tl.constexpr(token_statistics.LEAST_DEFICIT)
_LONGEST_STEP = tl.constexpr(token_statistics.LONGEST_STEP)
_ESTIMATE_TOLERANCE, _MIN_ENTROPY = tl.constexpr(token_statistics.ESTIMATE_TOLERANCE), tl.constexpr(MIN_ENTROPY)
_SNAP, _SNAP_LIMIT = tl.constexpr(token_statistics.SNAP), tl.constexpr(token_statistics.SNAP_LIMIT)
_EPS = tl.constexpr(torch.finfo(torch.float32).eps)
_BOTH, _STUDENT_ONLY = tl.constexpr(BOTH), tl.constexpr(STUDENT_ONLY)
_FLOOR = tl.constexpr(FLOOR)
_UNCONVERGED = tl.constexpr(int(Status.UNCONVERGED))
_MATCH_TOLERANCE = tl.constexpr(MATCH_TOLERANCE)
_MATCHED, _CAPPED = tl.constexpr(int(Status.MATCHED)), tl.constexpr(int(Status.CAPPED))
_OUT_OF_RANGE = tl.constexpr(int(Status.OUT_OF_RANGE))
_UNDETERMINED, _GIVEN = tl.constexpr(int(Status.UNDETERMINED)), tl.constexpr(int(Status.GIVEN))


@triton.jit
def cumulants(beta, tail, first, second, third):
    """Compute `Cumulants.from_sums`."""
    total = 1 + tail
    mean, square, cube = first / total, second / total, third / total
    return (
        beta + tl.zeros_like(mean),
        log_one_plus_64(tail),
        mean,
        square - mean * mean,
        cube - 3 * mean * square + 2 * mean * mean * mean,
    )


@triton.jit
def entropy_of(point):
    """Compute `Cumulants.entropy`."""
    return point[1] - point[0] * point[2]


@triton.jit
def extrapolated(here, beta):
    """Compute `Cumulants.extrapolated`: log S0 and H."""
    _, log_sum, mean, variance, third = here
    step = beta - here[0]
    log_sum = log_sum + step * (mean + step * (variance / 2 + step * third / 6))
    return log_sum, log_sum - beta * (mean + step * (variance + step * third / 2))


@triton.jit
def nothing_yet(like):
    """Return the state of `with_point` before the first point of the grid."""
    zero = tl.zeros_like(like)
    point = (zero, zero, zero, zero, zero)
    return (zero, zero, zero), point, point, point, (zero, zero, zero), zero + 1e9


@triton.jit
def with_point(solved, point, wanted_entropy, distance, is_first):
    """Return the state of the search on the grid after one more point of the grid.

    The state holds the first point, the last point so far, both ends of the first cell in which H falls below H(p), the
    point that matches to rounding (`token_statistics.SNAP`), and the distance of this point from the favoured point.
    The points come one at a time: all points of a grid would not fit into registers.
    """
    first, last, left, right, match, nearest = solved
    wanted, entropy = at_least(wanted_entropy, _MIN_ENTROPY), entropy_of(point)
    crosses = (entropy_of(last) > wanted) & ~(entropy > wanted) & (left[0] == 0) & ~is_first
    noise = _SNAP * _EPS * (entropy + point[0] * point[0] * point[3])
    matches = (tl.abs(entropy - wanted) <= at_most(noise, _SNAP_LIMIT)) & (distance < nearest)
    return (
        where(is_first, point[:3], first),
        point,
        where(crosses, last, left),
        where(crosses, point, right),
        where(matches, point[:3], match),
        tl.where(matches, distance, nearest),
    )


@triton.jit
def on_grid(solved, wanted_entropy, max_entropy, GIVEN: tl.constexpr):
    """Compute `token_statistics.solve_on_grid`: beta, log_sum, left, right, inside."""
    first, last, left, right, match, nearest = solved
    if GIVEN:
        beta, log_sum, inside = last[0], last[1], last[0] != last[0]
    else:
        wanted = at_least(wanted_entropy, _MIN_ENTROPY)
        soft, hard, matches = entropy_of(first) > wanted, ~(entropy_of(last) > wanted), nearest < 1e9
        root = as_float32(root_between(left, right, wanted, max_entropy))
        point = where(matches, match, where(soft, last[:3], first))
        finite = is_finite(wanted_entropy + entropy_of(first))
        inside = soft & hard & ~matches & finite
        beta = tl.where(finite, tl.where(inside, root, point[0]), float("nan"))
        log_sum = tl.where(inside, log_sum_between(left, right, root), point[1])
        log_sum = tl.where(finite, log_sum, float("nan"))
    return beta, log_sum, left, right, inside


@triton.jit
def refined(here, left, right, inside, wanted_entropy, max_entropy):
    """Compute `BetaSolution.refined`: beta, log_sum, entropy, left, right, converged."""
    wanted = at_least(wanted_entropy, _MIN_ENTROPY)
    soft = entropy_of(here) > wanted
    left, right = where(soft, here, left), where(soft, right, here)
    root = root_between(left, right, wanted, max_entropy)
    # The root is NaN where the entropy does not change to float64 precision.
    root = tl.where(inside & (root == root), root, here[0])
    is_near = tl.abs(tl.log(root / here[0])) <= _LONGEST_STEP
    agrees = tl.abs(extrapolated(here, root)[1] - wanted) <= _ESTIMATE_TOLERANCE
    beta = as_float32(root)
    log_sum, entropy = extrapolated(here, beta)
    return beta, log_sum, entropy, left, right, ~inside | (is_near & agrees)


@triton.jit
def where(condition, a, b):
    """Return tl.where of each pair of elements of two tuples."""
    out = ()
    for i in tl.static_range(len(a)):
        out = out + (tl.where(condition, a[i], b[i]),)
    return out


@triton.jit
def root_between(left, right, wanted, max_entropy):
    """Compute `token_statistics._root_between`."""
    floor, width = _floor(left, right), tl.log(right[0] / left[0])
    f0, d0, c0 = _mismatch(left, floor, wanted, max_entropy)
    f1, d1, c1 = _mismatch(right, floor, wanted, max_entropy)
    curve = _quintic(f0, d0 * width, c0 * width * width, f1, d1 * width, c1 * width * width)
    low, high = tl.zeros_like(width), tl.zeros_like(width) + 1
    at_low, at_high = f0, f1
    for _ in range(12):
        middle = (low + high) / 2
        value = _value(curve, middle)
        soft = value > 0
        low, high = tl.where(soft, middle, low), tl.where(soft, high, middle)
        at_low, at_high = tl.where(soft, value, at_low), tl.where(soft, at_high, value)
    fraction = at_low / (at_low - at_high)
    fraction = at_most(at_least(tl.where(fraction == fraction, fraction, 0.5), 0.0), 1.0)
    return left[0] * tl.exp((low + (high - low) * fraction) * width)


@triton.jit
def _floor(left, right):
    """Compute `token_statistics._floor`."""
    fall, bend = right[0] * right[3], -(right[3] + right[0] * right[4])
    least = fall / (right[0] - left[0])
    steepest = at_least(tl.where(bend > least, bend, least), _LEAST_ENTROPY)
    return at_least(entropy_of(right) - fall * fall / steepest, 0.0)


@triton.jit
def _mismatch(point, floor, wanted, max_entropy):
    """Compute `token_statistics._mismatch`: G(H) - G(wanted), and its first two derivatives."""
    beta, _, _, variance, third = point
    entropy = entropy_of(point)
    excess, deficit = at_least(entropy - floor, _LEAST_ENTROPY), at_least(max_entropy - entropy, _LEAST_DEFICIT)
    v = beta * beta * variance
    first, second = -v, -(2 * v + beta * beta * beta * third)
    a, b = first / excess, first / deficit
    goal = tl.log(at_least(wanted - floor, _LEAST_ENTROPY)) - tl.log(at_least(max_entropy - wanted, _LEAST_DEFICIT))
    return tl.log(excess) - tl.log(deficit) - goal, a + b, second / excess - a * a + second / deficit + b * b


@triton.jit
def log_sum_between(left, right, beta):
    """Compute `token_statistics._log_sum_between`."""
    step = right[0] - left[0]
    square = step * step
    curve = _quintic(left[1], left[2] * step, left[3] * square, right[1], right[2] * step, right[3] * square)
    return _value(curve, (beta - left[0]) / step)


@triton.jit
def _quintic(f0, d0, c0, f1, d1, c1):
    """Compute `token_statistics._quintic`."""
    rest, rest_slope, rest_curvature = f1 - f0 - d0 - c0 / 2, d1 - d0 - c0, c1 - c0
    return (
        f0,
        d0,
        c0 / 2,
        10 * rest - 4 * rest_slope + rest_curvature / 2,
        -15 * rest + 7 * rest_slope - rest_curvature,
        6 * rest - 3 * rest_slope + rest_curvature / 2,
    )


@triton.jit
def _value(curve, x):
    """Compute `token_statistics._value`."""
    value = curve[5]
    for i in tl.static_range(5):
        value = curve[4 - i] + value * x
    return value


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


NUM_STATE = tl.constexpr(27)
"""The numbers of a token that ``finish_kernel`` receives, float64: 6 constants, 2 points of 5 numbers, and 11 that
stay."""


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
