# Copyright (c) 2026 the megatron_selfdistill authors. Apache-2.0.
# mypy: disable-error-code="assignment, misc"
# ruff: noqa: RUF005
"""What happens between the passes as two Triton kernels: the formulas of ``row_statistics`` and ``entropy_match``.

In PyTorch these are hundreds of operations on [T, J] numbers, whose launches take a GPU longer than its passes over the
logits.  All arithmetic is float64, a program has all parts of a few rows, and every rank has the same parts: the same
bits on every rank.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import triton
import triton.language as tl
from torch import Tensor

from megatron_selfdistill.loss import entropy_match, target
from megatron_selfdistill.loss.divergence import FLOOR
from megatron_selfdistill.loss.entropy_kernels import (
    cubic,
    cumulants,
    fourth_cumulant,
    log_sum_in_cell,
    mismatch,
    polished,
    root_in_cell,
)
from megatron_selfdistill.loss.first_pass_kernel import BOTH, STUDENT_ONLY, TEACHER_ONLY
from megatron_selfdistill.loss.grid import Grid
from megatron_selfdistill.loss.kernel_math import (
    as_float32,
    at_least,
    at_most,
    exp_minus_one_64,
    highest_of,
    is_finite,
    log_one_plus_64,
)
from megatron_selfdistill.loss.kernels import ALL_REGISTERS, COMPILED, as_sum, mix_of
from megatron_selfdistill.loss.row_statistics import RowResults
from megatron_selfdistill.loss.row_sums import RowConstants

NUMBERS = 32
"""Parts times rows of a program, of one warp: four numbers per thread while parts are merged."""
SOLVING = {**COMPILED, **ALL_REGISTERS}
MOST_ROWS = 32
"""Of a program: one per thread after the merging."""
NUM_STATE = 18
"""Numbers of a row that the second kernel takes over from the first, float64."""
RESULTS = (
    "reverse_kl forward_kl student_entropy teacher_entropy target_entropy "
    "student_log_prob teacher_log_prob target_log_prob"
).split()
"""Of `RowResults`, float32, in the order in which the second kernel writes them."""

_FLOOR = tl.constexpr(FLOOR)
_BOTH, _STUDENT_ONLY, _TEACHER_ONLY = tl.constexpr(BOTH), tl.constexpr(STUDENT_ONLY), tl.constexpr(TEACHER_ONLY)
_SNAP, _SNAP_LIMIT = tl.constexpr(entropy_match.SNAP), tl.constexpr(entropy_match.SNAP_LIMIT)
_EPS = tl.constexpr(torch.finfo(torch.float32).eps)
_MIN_ENTROPY, _MATCH_TOLERANCE = tl.constexpr(target.MIN_ENTROPY), tl.constexpr(target.MATCH_TOLERANCE)
_MATCHED, _CAPPED = tl.constexpr(int(target.Status.MATCHED)), tl.constexpr(int(target.Status.CAPPED))
_OUT_OF_RANGE = tl.constexpr(int(target.Status.OUT_OF_RANGE))
_UNDETERMINED, _GIVEN = tl.constexpr(int(target.Status.UNDETERMINED)), tl.constexpr(int(target.Status.GIVEN))


@dataclass(frozen=True)
class Solving:
    """Every row between the two passes; ``constants`` is what the second one takes.

    state: [NUM_STATE, T] and shift: [parts, T], float64; grid_entropies: [T, num_grid].
    """

    state: Tensor
    shift: Tensor
    constants: RowConstants
    grid_entropies: Tensor


def solve_rows(gathered: Tensor, grid: Grid) -> Solving:
    """`row_statistics.solve_rows`."""
    num_parts, num_rows, _ = gathered.shape
    state, shift = (gathered.new_empty(n, num_rows, dtype=torch.float64) for n in (NUM_STATE, num_parts))
    constants, entropies = gathered.new_empty(6, num_rows), gathered.new_empty(num_rows, grid.num_grid)
    if num_rows:
        programs, sizes = _programs(num_rows, num_parts)
        _solve_kernel[programs](
            gathered,
            grid.on(gathered.device),
            state,
            shift,
            constants,
            entropies,
            num_rows,
            num_parts,
            as_sum(grid.mix_weights[0]),
            MIX=mix_of(grid.mix_weights),
            J=len(grid.betas),
            NUM_GRID=grid.num_grid,
            FAVOURED=grid.favoured,
            GIVEN=grid.given,
            **sizes,
        )
    return Solving(state, shift, RowConstants(*constants.unbind(0)), entropies)


def finish_rows(
    solving: Solving, gathered: Tensor, grid: Grid, response_tokens: Tensor | None, vocab_size: int
) -> RowResults:
    """`row_statistics.finish_rows`."""
    num_parts, num_rows, num_columns = gathered.shape
    outputs = _Outputs.new(gathered, solving.grid_entropies)
    if num_rows:
        programs, sizes = _programs(num_rows, num_parts)
        _finish_kernel[programs](
            solving.state,
            solving.shift,
            gathered,
            outputs.status if response_tokens is None else response_tokens.contiguous(),
            grid.on(gathered.device),
            *outputs.pointers(),
            num_rows,
            num_parts,
            vocab_size,
            as_sum(grid.mix_weights[0]),
            MIX=mix_of(grid.mix_weights),
            NUM_GRID=grid.num_grid,
            GIVEN=grid.given,
            LOWEST_IS_BOUND=grid.lowest_is_bound,
            HAS_TOKENS=response_tokens is not None,
            NUM_COLUMNS=num_columns,
            **sizes,
        )
    return outputs.results()


def finish_in_one_pass(gathered: Tensor, grid: Grid, response_tokens: Tensor | None, vocab_size: int) -> RowResults:
    """`row_statistics.finish_in_one_pass`."""
    num_parts, num_rows, num_columns = gathered.shape
    outputs = _Outputs.new(gathered, gathered.new_empty(num_rows, grid.num_grid))
    if num_rows:
        programs, sizes = _programs(num_rows, num_parts)
        _one_pass_kernel[programs](
            gathered,
            outputs.status if response_tokens is None else response_tokens.contiguous(),
            grid.on(gathered.device),
            outputs.grid_entropies,
            *outputs.pointers(),
            num_rows,
            num_parts,
            vocab_size,
            as_sum(grid.mix_weights[0]),
            MIX=mix_of(grid.mix_weights),
            J=len(grid.betas),
            NUM_GRID=grid.num_grid,
            FAVOURED=grid.favoured,
            GIVEN=grid.given,
            LOWEST_IS_BOUND=grid.lowest_is_bound,
            HAS_TOKENS=response_tokens is not None,
            WITH_FORWARD=grid.with_forward_kl,
            NUM_COLUMNS=num_columns,
            **sizes,
        )
    return outputs.results()


@dataclass(frozen=True)
class _Outputs:
    """Of the last kernel: float32 [len(RESULTS), T] and [6, T]; float64 [2, T], beta and the log-normaliser."""

    numbers: Tensor
    constants: Tensor
    exact: Tensor
    status: Tensor
    agreement: Tensor
    grid_entropies: Tensor

    @classmethod
    def new(cls, gathered: Tensor, grid_entropies: Tensor) -> _Outputs:
        num_rows = gathered.shape[1]
        return cls(
            gathered.new_empty(len(RESULTS), num_rows),
            gathered.new_empty(6, num_rows),
            gathered.new_empty(2, num_rows, dtype=torch.float64),
            gathered.new_empty(num_rows, dtype=torch.int64),
            gathered.new_empty(num_rows, dtype=torch.bool),
            grid_entropies,
        )

    def pointers(self) -> tuple[Tensor, ...]:
        return self.numbers, self.constants, self.exact, self.status, self.agreement.view(torch.uint8)

    def results(self) -> RowResults:
        return RowResults(
            constants=RowConstants(*self.constants.unbind(0)),
            beta=self.exact[0],
            log_normaliser=self.exact[1],
            status=self.status,
            top1_agreement=self.agreement,
            grid_entropies=self.grid_entropies,
            **dict(zip(RESULTS, self.numbers.unbind(0), strict=True)),
        )


def _programs(num_rows: int, num_parts: int) -> tuple[tuple[int], dict[str, int | bool]]:
    parts = triton.next_power_of_2(num_parts)
    rows = max(1, min(MOST_ROWS, NUMBERS // parts))
    return (triton.cdiv(num_rows, rows),), {"ROWS": rows, "PARTS": parts, "num_warps": 1, **SOLVING}


@triton.jit(do_not_specialize=["num_rows", "num_parts"])
def _solve_kernel(
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
    rows, inside, place, there = _rows_and_parts(num_rows, num_parts, ROWS, PARTS)
    at = gathered + place * (14 + 4 * J)
    student, teacher, mix_max, shift, only_student, only_mix, max_entropy = _merged_rows(at, there, mix_weight, MIX)
    tl.store(shifts + place, shift, mask=there)
    solved = _nothing_yet(max_entropy, 8)
    for j in range(J):
        beta = tl.load(betas + j).to(tl.float64)
        here = _merged_moments(at + 12 + 4 * j, there, shift, beta)
        _store_entropy(grid_entropies, here, beta, j, rows, inside, NUM_GRID)
        point = (beta + tl.zeros_like(max_entropy),) + here + mismatch(here, beta, student[2], max_entropy)
        solved = _with_point(solved, point, student[2], tl.abs(j - FAVOURED), j == 0)
    beta, log_sum, lowest, highest, polish, _ = _on_grid(solved, student[2], GIVEN)
    log_sum = as_float32(log_sum)
    values = (student[0], teacher[0], mix_max, student[1], beta, log_sum)
    for i in tl.static_range(6):
        tl.store(constants + i * num_rows + rows, values[i].to(tl.float32), mask=inside)
    student_token, teacher_token = _token_logits(at + 12 + 4 * J, there)
    values = values + (teacher[1], student[2], teacher[2], max_entropy, lowest, highest, student_token, teacher_token)
    values = values + (polish.to(tl.float64), only_student, only_mix, _agree(student, teacher))
    for i in tl.static_range(18):
        tl.store(state + i * num_rows + rows, values[i], mask=inside)


@triton.jit(do_not_specialize=["num_rows", "num_parts", "vocab_size"])
def _one_pass_kernel(
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
    rows, inside, place, there = _rows_and_parts(num_rows, num_parts, ROWS, PARTS)
    at = gathered + place * NUM_COLUMNS
    student, teacher, mix_max, shift, only_student, only_mix, max_entropy = _merged_rows(at, there, mix_weight, MIX)
    solved = _nothing_yet(max_entropy, 10)
    for j in range(J):
        beta = tl.load(betas + j).to(tl.float64)
        moments = at + 12 + 4 * j
        here = _merged_moments(moments, there, shift, beta)
        _store_entropy(grid_entropies, here, beta, j, rows, inside, NUM_GRID)
        point = (beta + tl.zeros_like(max_entropy),) + here + mismatch(here, beta, student[2], max_entropy)
        if WITH_FORWARD:
            point += _merged_mean_y(at, at + 13 + 4 * J + 2 * j, moments, there, student[0], shift, beta, here)
        else:
            point += (tl.zeros_like(max_entropy), tl.zeros_like(max_entropy))
        solved = _with_point(solved, point, student[2], tl.abs(j - FAVOURED), j == 0)
    beta, log_sum, _lowest, _highest, between, point = _on_grid(solved, student[2], GIVEN)
    # Inside a cell H(q) is what was solved for, and E_q[y] is a cubic in E_q[x].
    entropy = tl.where(between, at_least(student[2], _MIN_ENTROPY), point[1] - point[0] * point[2])
    mean_x = _merged_student_mean(at, at + 12 + 4 * J, there, student[0], shift)
    reverse_kl, forward_kl = log_sum - beta * mean_x - student[2], tl.zeros_like(mean_x)
    if WITH_FORWARD:
        left, right = solved[2], solved[3]
        slopes = left[9] / left[3], right[9] / right[3]
        inner = cubic(left[8], slopes[0], right[8], slopes[1], left[2], right[2], (log_sum - entropy) / beta)
        forward_kl = student[1] - tl.where(between, inner, point[4]) - entropy

    weight = tl.full([], mix_weight, tl.float64)
    token_logits = _token_logits(at + NUM_COLUMNS - 2, there)
    log_probs = _log_probs(token_logits, student, teacher, mix_max, beta, log_sum, weight, MIX)
    _store_log_probs(results, log_probs, tokens, rows, inside, num_rows, vocab_size, HAS_TOKENS)
    kls = _infinite_where(only_student, reverse_kl), _infinite_where(only_mix, forward_kl)
    _store_numbers(results, kls + (student[2], teacher[2], at_least(entropy, 0.0)), rows, inside, num_rows)
    height = _mixed(student[0], teacher[0], weight, MIX) + mix_max
    _store_exact(exact, constants, student, teacher, mix_max, beta, log_sum, height, rows, inside, num_rows)
    status = _status(betas, beta, student[2], entropy, NUM_GRID, GIVEN, LOWEST_IS_BOUND)
    tl.store(statuses + rows, status.to(tl.int64), mask=inside)
    tl.store(agreements + rows, _agree(student, teacher).to(tl.uint8), mask=inside)


@triton.jit
def _rows_and_parts(num_rows, num_parts, ROWS: tl.constexpr, PARTS: tl.constexpr):
    """This program's rows, which of them exist, and the same of [ROWS, PARTS] as places in [parts, T]."""
    rows = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    parts = tl.arange(0, PARTS)[None, :]
    inside = rows < num_rows
    return rows, inside, parts * num_rows + rows[:, None], inside[:, None] & (parts < num_parts)


@triton.jit
def _column(pointer, there, other):
    return tl.load(pointer, mask=there, other=other).to(tl.float64)


@triton.jit
def _merged_rows(at, there, mix_weight, MIX: tl.constexpr):
    """`Rows.merge` but for the moments.  Student and teacher: maximum, log_sum, entropy, argmax."""
    weight = tl.full([], mix_weight, tl.float64)
    student_max, student_log_sum, student_entropy, student_argmax, local_student = _merged_softmax(at, there)
    teacher_max, teacher_log_sum, teacher_entropy, teacher_argmax, local_teacher = _merged_softmax(at + 4, there)
    local_max = _mixed(local_student, local_teacher, weight, MIX) + _column(at + 8, there, float("-inf"))
    reference = _mixed(student_max, teacher_max, weight, MIX)
    mix_max = as_float32(highest_of(local_max) - reference)
    shift = at_least(local_max - (reference + mix_max)[:, None], _FLOOR)
    num_student = tl.sum(_column(at + 9, there, 0.0), 1)
    num_mix = tl.sum(_column(at + 10, there, 0.0), 1)
    num_both = tl.sum(_column(at + 11, there, 0.0), 1)
    student = (student_max, student_log_sum, student_entropy, student_argmax)
    teacher = (teacher_max, teacher_log_sum, teacher_entropy, teacher_argmax)
    only_student, only_mix = (num_student > num_both).to(tl.float64), (num_mix > num_both).to(tl.float64)
    return student, teacher, mix_max, shift, only_student, only_mix, tl.log(num_mix)


@triton.jit
def _agree(student, teacher):
    return ((student[3] == teacher[3]) & is_finite(student[3])).to(tl.float64)


@triton.jit
def _token_logits(at, there):
    return tl.sum(_column(at, there, 0.0), 1), tl.sum(_column(at + 1, there, 0.0), 1)


@triton.jit
def _store_entropy(grid_entropies, here, beta, j, rows, inside, NUM_GRID: tl.constexpr):
    entropy = here[0] - beta * here[1]
    tl.store(grid_entropies + rows * NUM_GRID + j, entropy.to(tl.float32), mask=inside & (j < NUM_GRID))


@triton.jit
def _merged_student_mean(at, sum_of_x, there, student_max, shift):
    """`row_statistics._merge_student_mean`."""
    total = 1 + _column(at + 1, there, 0.0)
    weight = tl.exp(at_least(_column(at, there, float("-inf")) - student_max[:, None], _FLOOR))
    return tl.sum(weight * (_column(sum_of_x, there, 0.0) + shift * total), 1) / tl.sum(weight * total, 1)


@triton.jit
def _merged_mean_y(at, joint, moments, there, student_max, shift, beta, here):
    """`row_statistics._merge_mean_y`, at one beta."""
    rise = at_least(_column(at, there, float("-inf")) - student_max[:, None], _FLOOR)
    s0, s1 = 1 + _column(moments, there, 0.0), _column(moments + 1, there, 0.0)
    y0, y1 = _column(joint, there, 0.0), _column(joint + 1, there, 0.0)
    weight = tl.exp(beta * shift) / tl.exp(here[0])[:, None]
    mean_y = tl.sum(weight * (y0 + rise * s0), 1)
    mean_xy = tl.sum(weight * (y1 + shift * y0 + rise * s1 + shift * rise * s0), 1)
    return mean_y, mean_xy - here[1] * mean_y


@triton.jit
def _mixed(student, teacher, weight, MIX: tl.constexpr):
    if MIX == _BOTH:
        mixed = weight * teacher + student
    elif MIX == _STUDENT_ONLY:
        mixed = student
    else:
        mixed = teacher
    return mixed


@triton.jit
def _merged_softmax(at, there):
    """`Softmax.merge`: maximum, log_sum, entropy, argmax; and the parts' maxima, 0 for a part without columns."""
    maximum = _column(at, there, float("-inf"))
    total = 1 + _column(at + 1, there, 0.0)
    first, argmax = _column(at + 2, there, 0.0), _column(at + 3, there, float("inf"))
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
def _merged_moments(at, there, shift, beta):
    """`row_statistics._merge_moments`."""
    s0 = 1 + _column(at, there, 0.0)
    s1, s2, s3 = _column(at + 1, there, 0.0), _column(at + 2, there, 0.0), _column(at + 3, there, 0.0)
    weight = tl.exp(beta * shift)
    return cumulants(
        tl.sum(weight * s0, 1) - 1,
        tl.sum(weight * (s1 + shift * s0), 1),
        tl.sum(weight * (s2 + shift * (2 * s1 + shift * s0)), 1),
        tl.sum(weight * (s3 + shift * (3 * s2 + shift * (3 * s1 + shift * s0))), 1),
    )


@triton.jit
def _nothing_yet(like, N: tl.constexpr):
    """What is known of the grid before its first point, of N numbers: see `_with_point`."""
    point = ()
    for _ in tl.static_range(N):
        point = point + (tl.zeros_like(like),)
    return _brief(point), point, point, point, _brief(point), tl.zeros_like(like) + 1e9


@triton.jit
def _brief(point):
    """beta, log_sum, mean and f of a point, and under ``Grid.one_pass`` E[y]: registers are scarce."""
    return point[0], point[1], point[2], point[5], point[len(point) - 2]


@triton.jit
def _with_point(solved, point, student_entropy, distance, is_first):
    """The first point of the grid, the last one so far, both ends of the cell in which f falls below 0, the point that
    matches to rounding (`entropy_match.SNAP`), and how far that is from the favoured one.

    A point: beta, its cumulants, f with slope and curvature; under ``Grid.one_pass`` also E[y] and its derivative.
    One at a time: all the points of a grid would not fit into registers.
    """
    first, last, left, right, match, nearest = solved
    crosses = (last[5] > 0) & (point[5] <= 0)
    entropy = point[1] - point[0] * point[2]
    noise = _SNAP * _EPS * (entropy + point[0] * point[0] * point[3])
    wanted = at_least(student_entropy, _MIN_ENTROPY)
    matches = (tl.abs(entropy - wanted) <= at_most(noise, _SNAP_LIMIT)) & (distance < nearest)
    return (
        _where(is_first, _brief(point), first),
        point,
        _where(crosses, last, left),
        _where(crosses, point, right),
        _where(matches, _brief(point), match),
        tl.where(matches, distance, nearest),
    )


@triton.jit
def _where(condition, a, b):
    out = ()
    for i in tl.static_range(len(a)):
        out = out + (tl.where(condition, a[i], b[i]),)
    return out


@triton.jit
def _on_grid(solved, student_entropy, GIVEN: tl.constexpr):
    """`entropy_match.solve_on_grid`: beta, log_sum, lowest, highest, inside; and `_brief` where beta is a point."""
    first, last, left, right, match, nearest = solved
    if GIVEN:
        beta, log_sum, lowest, highest = last[0], last[1], last[0], last[0]
        point, inside = _brief(last), last[0] != last[0]
    else:
        soft, hard, matches = first[3] > 0, last[5] <= 0, nearest < 1e9
        inside = soft & hard & ~matches
        lowest, highest = left[0], right[0]
        root = as_float32(root_in_cell(left[5:8], right[5:8], lowest, highest))
        point = _where(matches, match, _where(soft, _brief(last), first))
        sound = is_finite(student_entropy + first[1] - first[0] * first[2])
        beta = tl.where(sound, tl.where(inside, root, point[0]), float("nan"))
        log_sum = log_sum_in_cell(left[1:5], right[1:5], lowest, highest, root)
        log_sum = tl.where(sound, tl.where(inside, log_sum, point[1]), float("nan"))
        inside = inside & sound
    return beta, log_sum, lowest, highest, inside, point


@triton.jit(do_not_specialize=["num_rows", "num_parts", "vocab_size"])
def _finish_kernel(
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
    rows, inside, place, there = _rows_and_parts(num_rows, num_parts, ROWS, PARTS)
    known = ()
    for i in tl.static_range(18):
        known = known + (tl.load(state + i * num_rows + rows, mask=inside, other=0.0),)
    student_max, teacher_max, mix_max, student_log_sum, old_beta, assumed = known[:6]
    teacher_log_sum, student_entropy, teacher_entropy, max_entropy, lowest, highest = known[6:12]
    student_token, teacher_token, polish, only_student, only_mix, agree = known[12:18]
    part = ()
    for i in tl.static_range(NUM_COLUMNS):
        part = part + (tl.sum(_column(gathered + place * NUM_COLUMNS + i, there, 0.0), 1),)

    shift = tl.load(shifts + place, mask=there, other=_FLOOR)
    here, fourth = _merged_second(part, shift, old_beta, assumed)
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
    height = _mixed(student_max, teacher_max, weight, MIX) + mix_max
    _store_exact(exact, constants, student, teacher, mix_max, beta, log_sum, height, rows, inside, num_rows)
    status = _status(betas, beta, student_entropy, entropy, NUM_GRID, GIVEN, LOWEST_IS_BOUND)
    tl.store(statuses + rows, status.to(tl.int64), mask=inside)
    tl.store(agreements + rows, agree.to(tl.uint8), mask=inside)


@triton.jit
def _log_probs(token_logits, student, teacher, mix_max, beta, log_sum, weight, MIX: tl.constexpr):
    """`Rows.log_probs`; student and teacher begin with maximum and log_sum."""
    y, z = token_logits[0] - student[0], token_logits[1] - teacher[0]
    x = _mixed(y, z, weight, MIX) - mix_max
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
def _merged_second(part, shift, beta, assumed):
    """The cumulants of x at beta, and the fourth, from the second pass and each part's largest column."""
    tops, scale = tl.exp(beta[:, None] * shift), tl.exp(assumed)
    tail = scale * part[0] + tl.sum(tops, 1) - 1
    first = scale * part[1] + tl.sum(tops * shift, 1)
    second = scale * part[2] + tl.sum(tops * shift * shift, 1)
    third = scale * part[3] + tl.sum(tops * shift * shift * shift, 1)
    fourth = scale * part[4] + tl.sum(tops * shift * shift * shift * shift, 1)
    here, total = cumulants(tail, first, second, third), 1 + tail
    return here, fourth_cumulant(here, second / total, third / total, fourth / total)


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
