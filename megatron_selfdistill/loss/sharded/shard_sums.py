# Copyright (c) 2026 the megatron_selfdistill authors. Apache-2.0.
"""The passes over one vocabulary shard in PyTorch: all code that reads logits [T, columns], chunk of tokens by chunk.

A row is the logits of one token.  Logits are widened to float32 (float64 stays) one chunk at a time.
The passes use shifted logits, which have the small rounding errors of differences: y = s - max s, z = t - max t, and x
= (w z + y) - max(w z + y), which is m up to a constant.
The largest term of a sum of exponentials is exactly 1.  The sum does not include it and is then called the tail, and
the caller adds it in float64: so the entropy of an almost certain token keeps all digits.

The first pass takes moments at the betas of a `BetaGrid`, as numbers that the sums can hold.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from functools import lru_cache
from typing import NamedTuple

import torch
from torch import Tensor

from megatron_selfdistill.loss.divergence import (
    FLOOR,
    forward_kl_terms,
    q_minus_p,
    reverse_kl_gradient,
    reverse_kl_terms,
)
from megatron_selfdistill.loss.jsd_and_renyi import jsd_gradient, renyi_gradient
from megatron_selfdistill.loss.target import RANGE, Divergence, Status, Target, mixed_logits


def beta_grid(target: Target, unit: float = 1.0) -> tuple[float, ...]:
    """Return the betas, rising, at which the first pass takes the entropy of the mix; the ends are `Target.beta_range`.

    The values are 1 / (1 + w) times powers of 2, so that equal logits find their root on the grid, from
    1 / (RANGE (1 + w)) to RANGE / (1 + w); with a bound inside that range they start at 1 / k_max.  These are 9 values
    without a bound and 5 with k_max = 1 + w.  Under fixed and teacher_alone the grid is the one given beta.
    ``unit``: the betas are those of m / unit, see `mix_unit`.
    """
    if target.rule in ("fixed", "teacher_alone"):
        return (_given_beta(target, unit),)
    octaves = round(math.log2(RANGE))
    # A power of 2 times one number, so that each value is exactly twice the one before.
    grid = [2.0**j * (unit / target.geometric_k) for j in range(-octaves, octaves + 1)]
    if not target.lowest_is_bound:
        return tuple(grid)
    assert target.k_bound is not None
    lowest = unit / target.k_bound
    return (lowest, *(beta for beta in grid if beta > lowest * (1 + 1e-9)))


def mix_unit(target: Target, teacher_weights: Tensor | None = None) -> float | Tensor:
    """Return the number by which the mix is divided before it reaches the passes.

    It is 1 + w with a reference as the anchor, 1 - l where the reference has the share l of it, else 1.

    With a reference, the passes receive the logits m / (1 + w) = (w t + r) / (1 + w) in place of the teacher's.  Their
    magnitude is that of logits, and their grid of betas is the same for every w.  With controls m = w (t - c) + r has
    this magnitude already, and the number is 1.  With a share l the passes receive (w t + l r) / (1 - l), and add s.
    ``teacher_weights``: w of each token [T], for which the result is [T] float64.
    """
    if teacher_weights is not None:
        return 1 + teacher_weights.double()
    return target.geometric_k if target.is_anchored else 1 - target.reference_share


def _given_beta(target: Target, unit: float) -> float:
    """Return `Target.given_beta` of m / unit: exactly 1 for k = unit."""
    assert target.given_beta is not None
    return (
        unit / target.geometric_k if target.k is None and target.rule != "teacher_alone" else unit * target.given_beta
    )


@dataclass(frozen=True)
class BetaGrid:
    """The quantities that the first pass computes for every token; equal on all ranks.

    betas: J values at which moments are taken, each one a number of ``dtype``.
    num_grid: the number of leading betas that are ``beta_grid(target)``; under "batch" the given beta follows.
    favoured: index of the beta nearest to 1 / (1 + w), at which equal logits have their root.
    doubled: indices of the betas that are twice the beta before, whose exponentials may be computed as squares.
    given: whether the rule gives beta, which is betas[-1], and solves nothing.
    lowest_is_bound: see `Target.lowest_is_bound`.
    mix_weights: (weight of t, weight of s) in m; (1, 0) with a reference, where the mix comes in place of t, and (1, 1)
    with a share of one, where all of the mix but the student comes in place of t.
    unit: see `mix_unit`; ``betas`` are those of m / unit.
    dtype: the dtype of the sums, float32 or float64.
    """

    betas: tuple[float, ...]
    num_grid: int
    favoured: int
    doubled: tuple[int, ...]
    given: bool
    lowest_is_bound: bool
    mix_weights: tuple[float, float]
    unit: float
    dtype: torch.dtype

    @classmethod
    @lru_cache(maxsize=64)
    def of(cls, target: Target, dtype: torch.dtype) -> BetaGrid:
        """Return the grid of a target; powers of 2 between its betas stay exact in ``dtype``.

        The result is cached: a run has one target and asks for its grid at every call of the loss.
        """
        unit = float(mix_unit(target))
        grid = beta_grid(target, unit)
        asked = grid if target.rule != "batch" else (*grid, _given_beta(target, unit))
        betas = torch.tensor(asked, dtype=torch.float64).to(dtype).tolist()
        favoured = min(range(len(grid)), key=lambda j: abs(betas[j] * target.geometric_k - unit))
        return cls(
            betas=tuple(betas),
            num_grid=len(grid),
            favoured=favoured,
            doubled=tuple(j for j in range(1, len(betas)) if j != favoured and betas[j] == 2 * betas[j - 1]),
            given=target.given_beta is not None,
            lowest_is_bound=target.lowest_is_bound,
            mix_weights=(1.0, 1.0 - target.is_anchored) if target.has_reference else target.mix_weights,
            unit=unit,
            dtype=dtype,
        )

    @property
    def num_sums(self) -> int:
        """The number of sums of the first pass besides FIRST_PASS: four moments of each beta and two token logits."""
        return 4 * len(self.betas) + 2

    def on(self, device: torch.device, dtype: torch.dtype | None = None) -> Tensor:
        """Return ``betas`` as a tensor [J] in ``dtype``, by default in the dtype of the sums.

        The tensor is cached: the caller must not write to it.
        """
        return _on(self.betas, dtype or self.dtype, device)

    def reported(self, device: torch.device) -> Tensor:
        """Return the betas of m that `beta_grid` names, [num_grid] in the dtype of the sums, cached as by `on`."""
        return _on(tuple(beta / self.unit for beta in self.betas[: self.num_grid]), self.dtype, device)


@lru_cache(maxsize=64)
def _on(betas: tuple[float, ...], dtype: torch.dtype, device: torch.device) -> Tensor:
    """Return the betas on a device, from a cache.

    A copy from the host makes a GPU wait, and thousands of calls use the same betas.  The first call may run under
    inference mode, whose tensors autograd would refuse in later calls, so the tensor is made outside of that mode.
    """
    with torch.inference_mode(False):
        return torch.tensor(betas, dtype=dtype, device=device)


CHUNK_BYTES = {"cpu": 1 << 20, "other": 128 << 20}
"""The size of one temporary of a chunk of rows: it fits into a core's cache, or an accelerator reads and writes it in
more time than the host takes to queue the next operation (80 us at 3.3 TB/s)."""
Chunk = slice | Tensor
"""A chunk of rows: a slice, or indices [n]."""


@dataclass(frozen=True)
class Shard:
    """The valid columns of both logits on this rank, [T, num_valid], and how the passes mix and sum them.

    mix_weights: (weight of t, weight of s) in m.
    dtype: the dtype of the sums, float32 or float64.
    num_parts: the number of parts into which a pass cuts each row; the sums of parts are merged as the sums of ranks
    are.  PyTorch has 1; another backend may cut a row into more parts if there are fewer rows.
    """

    student: Tensor
    teacher: Tensor
    mix_weights: tuple[float, float]
    dtype: torch.dtype
    num_parts: int = 1

    def chunks(self, needed: Tensor | None = None) -> Iterable[Chunk]:
        """Return the chunks of rows that a pass works on.

        needed: [T] bool, the rows that matter; None: all of them.  On a CPU, where it costs no waiting, only needed
        rows are returned, as indices.
        """
        num_rows, num_columns = self.student.shape
        on_cpu = self.student.device.type == "cpu"
        step = max(1, CHUNK_BYTES["cpu" if on_cpu else "other"] // (max(1, num_columns) * self.dtype.itemsize))
        if needed is not None and on_cpu:
            rows = needed.nonzero().squeeze(1)
            return torch.split(rows, step) if len(rows) else ()
        return (slice(start, min(start + step, num_rows)) for start in range(0, num_rows, step))

    def over_rows(
        self,
        work: Callable[[Chunk], Tensor],
        num_outputs: int,
        needed: Tensor | None = None,
        *,
        empty: float = 0.0,
        dtype: torch.dtype | None = None,
    ) -> Tensor:
        """Return [1, T, num_outputs]: the result of ``work`` on every chunk; ``empty`` on a shard of padding only.

        dtype: the dtype of the result; None is the dtype of the sums.
        """
        out = self.student.new_full((self.student.shape[0], num_outputs), empty, dtype=dtype or self.dtype)
        if self.student.shape[1]:
            for rows in self.chunks(needed):
                out[rows] = work(rows)
        return out[None]


@dataclass(frozen=True)
class TokenConstants:
    """The numbers that turn the logits of a token into log p and log q; [T] each, in the dtype of the sums.

    log p = s - student_max - student_log_sum
    log q = beta x - log_sum with x = w (t - teacher_max) + (s - student_max) - mix_max
    """

    student_max: Tensor
    teacher_max: Tensor
    mix_max: Tensor
    student_log_sum: Tensor
    beta: Tensor
    log_sum: Tensor

    def tensors(self) -> tuple[Tensor, ...]:
        """Return the six fields in their order."""
        return tuple(getattr(self, name) for name in self.__dataclass_fields__)

    def rows(self, rows: Chunk) -> TokenConstants:
        """Return the constants of a chunk as columns [n, 1]."""
        return TokenConstants(*(t[rows, None] for t in self.tensors()))


class LogProbGradient(NamedTuple):
    """The incoming gradient of log p of T response tokens, and the places of these tokens on a shard."""

    incoming: Tensor
    """[T] in the dtype of the sums; NaN, or 0, for a token that is a valid column of no shard."""
    columns: Tensor
    """[T] int64: the column of the response token, counted from the shard's first column.  The shard holds the token if
    the column lies in 0 .. num_valid - 1."""

    @classmethod
    def of(
        cls, incoming: Tensor | None, response_tokens: Tensor, start: int, vocab_size: int
    ) -> LogProbGradient | None:
        """Return the gradient on the shard that begins at the global column ``start``; None if nothing comes in.

        response_tokens: [T] int64, global ids, valid in 0 .. vocab_size - 1.
        """
        if incoming is None:
            return None
        known = (response_tokens >= 0) & (response_tokens < vocab_size)
        return cls(torch.where(known | (incoming == 0), incoming, torch.nan), response_tokens - start)

    def of_tokens(self, tokens: slice) -> LogProbGradient:
        """Return the gradient of a slice of the tokens."""
        return LogProbGradient(self.incoming[tokens], self.columns[tokens])


FIRST_PASS = (
    "student_max student_tail student_first student_argmax "
    "teacher_max teacher_tail teacher_first teacher_argmax "
    "mix_max num_student num_mix num_both"
).split()
"""The columns of ``first_pass`` before the four moment sums of each beta.

Indices and counts stay below 2^24, so that float32 holds them exactly."""


def first_pass(shard: Shard, grid: BetaGrid, response_tokens: Tensor | None, start: int) -> tuple[Tensor, Tensor]:
    """Return maxima, sums of exponentials and moment sums of this shard's columns, relative to the shard's own maxima.

    response_tokens: [T] int64, global ids; None: there are none.  start: the global column of the shard's first column.
    The result is [num_parts, T, len(FIRST_PASS) + grid.num_sums] with the columns FIRST_PASS, argmaxes as global
    columns; then S0 - 1, S1, S2, S3 of x for each beta; then the student's and the teacher's logit of the response
    token, 0 where another part holds it.  The second result is the local argmax of m, [num_parts, T].
    On a part of padding only, maxima are -inf and sums are 0.
    """
    mix_argmax = torch.zeros(shard.student.shape[0], dtype=torch.int64, device=shard.student.device)

    def work(rows: Chunk) -> Tensor:
        y, z = shard.student[rows].to(shard.dtype), shard.teacher[rows].to(shard.dtype)
        (student_max, student_argmax), (teacher_max, teacher_argmax) = y.max(1), z.max(1)
        student_shift, teacher_shift = _without_minus_inf(student_max), _without_minus_inf(teacher_max)
        y, z = y - student_shift[:, None], z - teacher_shift[:, None]
        x = mixed_logits(y, z, *shard.mix_weights)
        top, mix_argmax[rows] = x.max(1)
        x = (x - _without_minus_inf(top)[:, None]).clamp_(min=FLOOR)
        y.clamp_(min=FLOOR)
        z.clamp_(min=FLOOR)
        columns = [student_max, *_tail_and_first(y, student_argmax), student_argmax]
        columns += [teacher_max, *_tail_and_first(z, teacher_argmax), teacher_argmax]
        columns += [top, _count(y), _count(x), _count(torch.minimum(x, y))]
        columns += _moments(x, mix_argmax[rows], grid)
        return torch.stack([column.to(shard.dtype) for column in columns], dim=1)

    sums = shard.over_rows(work, len(FIRST_PASS) + grid.num_sums - 2)
    if shard.student.shape[1] == 0:
        for name in ("student_max", "teacher_max", "mix_max"):
            sums[..., FIRST_PASS.index(name)] = -torch.inf
    for name in ("student_argmax", "teacher_argmax"):
        sums[..., FIRST_PASS.index(name)] += start
    return torch.cat([sums, _token_logits(shard, response_tokens, start)[None]], dim=2), mix_argmax[None]


def _token_logits(shard: Shard, response_tokens: Tensor | None, start: int) -> Tensor:
    """Return [T, 2]: the student's and the teacher's logit of the response token, 0 where another shard holds it."""
    num_rows, num_valid = shard.student.shape
    if num_valid == 0 or response_tokens is None:
        return shard.student.new_zeros(num_rows, 2, dtype=shard.dtype)
    local = response_tokens - start
    here = ((local >= 0) & (local < num_valid))[:, None]
    column = local.clamp(0, num_valid - 1)[:, None]
    both = [logits.gather(1, column).to(shard.dtype) for logits in (shard.student, shard.teacher)]
    return torch.where(here, torch.cat(both, dim=1), 0.0)


def _without_minus_inf(maximum: Tensor) -> Tensor:
    """Replace -inf by 0, by which a row of -inf is shifted; NaN and +inf stay and turn their row into NaN."""
    return maximum.masked_fill(torch.isneginf(maximum), 0.0)


def _count(shifted: Tensor) -> Tensor:
    """Return the number of columns that exist, in each row."""
    return torch.gt(shifted, FLOOR, out=torch.empty_like(shifted)).sum(1)


def _tail_and_first(shifted: Tensor, argmax: Tensor) -> tuple[Tensor, Tensor]:
    """Return the sum of e^y without its largest term, and the sum of e^y y."""
    e = shifted.exp().scatter_(1, argmax[:, None], 0.0)
    return e.sum(1), e.mul_(shifted).sum(1)


def _moments(x: Tensor, argmax: Tensor, grid: BetaGrid) -> list[Tensor]:
    """Return S0 - 1, S1, S2, S3 of x for each beta."""
    sums, e, term = [], torch.empty_like(x), torch.empty_like(x)
    for j, beta in enumerate(grid.betas):
        if j in grid.doubled:
            e.square_()
        else:
            torch.mul(x, beta, out=e).exp_().scatter_(1, argmax[:, None], 0.0)
        sums += [e.sum(1), torch.mul(e, x, out=term).sum(1), term.mul_(x).sum(1), term.mul_(x).sum(1)]
    return sums


SECOND_PASS = ("tail", "first", "second", "third", "reverse_kl", "student_mean")
SECOND_PASS_FORWARD = (*SECOND_PASS, "forward_kl", "y0", "y1", "y2", "y3")
"""The columns of ``second_pass``; the longer list is for forward KL."""


def second_pass(
    shard: Shard, constants: TokenConstants, mix_argmax: Tensor, *, forward_kl: bool, status: Tensor | None = None
) -> Tensor:
    """Return moments of x under q with the given normaliser, and the divergences: [num_parts, T, 6], for forward KL 11.

    tail .. third: sums of q x^k without the part's largest column; student_mean: sum of p x.
    reverse_kl, forward_kl: sums of the non-negative terms of the divergence; y0 .. y3: sums of q y x^k.
    status: [T], given for the third pass, in which only tokens that are UNCONVERGED matter.  On a CPU only their rows
    are read; elsewhere all rows are, because choosing rows would make the host wait for the device.
    """
    (argmax,) = mix_argmax
    needed = None if status is None else status == Status.UNCONVERGED

    def work(rows: Chunk) -> Tensor:
        chunk = constants.rows(rows)
        y, x = _shifted(shard, chunk, rows)
        log_p, log_q = y - chunk.student_log_sum, x * chunk.beta - chunk.log_sum
        p, q, d = log_p.exp(), log_q.exp(), log_q.sub_(log_p)
        divergences = [reverse_kl_terms(p, q, d).sum(1), (p * x).sum(1)]
        if forward_kl:
            term = q * y
            divergences += [forward_kl_terms(p, q, d).sum(1), term.sum(1)]
            divergences += [term.mul_(x).sum(1) for _ in range(3)]
        q.scatter_(1, argmax[rows, None], 0.0)
        moments = [q.sum(1)] + [q.mul_(x).sum(1) for _ in range(3)]
        return torch.stack(moments + divergences, dim=1)

    return shard.over_rows(work, len(SECOND_PASS_FORWARD if forward_kl else SECOND_PASS), needed)


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
    """Write the gradient of the student's logits s into ``out`` [T, num_valid].

    The gradient is ``grad_loss dD / ds + incoming (onehot(response token) - p)``, without the second term where
    ``log_prob`` is None.
    kl_value: [T] KL(p || q) for reverse KL, KL(p || M) for the JSD, the divergence itself for Renyi's, unused for
    forward KL.  grad_loss: [T].
    forward_shares: [T] `divergence.forward_share` of the tokens, given only if the divergence has ``forward_above``.
    out: may be the student's logits themselves.
    """
    if shard.student.shape[1] == 0:
        return
    for rows in shard.chunks():
        if divergence.is_renyi:
            log_p, log_q = row_log_probs(shard, constants.rows(rows), rows)
            p, gradient = log_p.exp(), renyi_gradient(log_p, log_q, kl_value[rows], divergence)
        else:
            p, gradient = _kl_or_jsd_gradient(shard, constants.rows(rows), rows, kl_value, divergence, forward_shares)
        gradient.mul_(grad_loss[rows, None])
        if log_prob is not None:
            _add_log_prob_gradient(gradient, p, log_prob.incoming[rows], log_prob.columns[rows])
        out[rows] = gradient


def _kl_or_jsd_gradient(
    shard: Shard,
    chunk: TokenConstants,
    rows: Chunk,
    kl_value: Tensor,
    divergence: Divergence,
    forward_shares: Tensor | None,
) -> tuple[Tensor, Tensor]:
    """Return p and the gradient of the divergence of a chunk."""
    p, q, d = row_probabilities(shard, chunk, rows)
    if divergence.kind == "forward_kl":
        return p, q_minus_p(p, q, d).neg_()
    if divergence.kind == "jsd":
        return p, jsd_gradient(p, d, divergence.jsd_lambda, kl_value[rows])
    gradient = reverse_kl_gradient(p, d, kl_value[rows])
    if forward_shares is not None:
        gradient.addcmul_(q_minus_p(p, q, d), forward_shares[rows, None], value=-1)
    return p, gradient


def _add_log_prob_gradient(gradient: Tensor, p: Tensor, incoming: Tensor, columns: Tensor) -> None:
    """Add ``incoming (onehot(columns) - p)`` to the gradient [n, num_valid] of a chunk; no device is waited for."""
    num_valid = gradient.shape[1]
    here = (columns >= 0) & (columns < num_valid)
    gradient.addcmul_(p, incoming[:, None], value=-1)
    gradient.scatter_add_(1, columns.clamp(0, num_valid - 1)[:, None], torch.where(here, incoming, 0.0)[:, None])


def _shifted(shard: Shard, chunk: TokenConstants, rows: Chunk) -> tuple[Tensor, Tensor]:
    """Return y and x of a chunk, relative to the maxima of the whole vocabulary."""
    y = shard.student[rows].to(shard.dtype) - chunk.student_max
    z = shard.teacher[rows].to(shard.dtype) - chunk.teacher_max
    x = (mixed_logits(y, z, *shard.mix_weights) - chunk.mix_max).clamp_(min=FLOOR)
    return y.clamp_(min=FLOOR), x


def row_probabilities(shard: Shard, chunk: TokenConstants, rows: Chunk) -> tuple[Tensor, Tensor, Tensor]:
    """Return p, q and log q - log p of a chunk."""
    y, x = _shifted(shard, chunk, rows)
    log_p, log_q = y.sub_(chunk.student_log_sum), x.mul_(chunk.beta).sub_(chunk.log_sum)
    return log_p.exp(), log_q.exp(), log_q.sub_(log_p)


def row_log_probs(shard: Shard, chunk: TokenConstants, rows: Chunk) -> tuple[Tensor, Tensor]:
    """Return log p and log q of a chunk, -inf where a column does not exist."""
    y, x = _shifted(shard, chunk, rows)
    log_p, log_q = y - chunk.student_log_sum, x * chunk.beta - chunk.log_sum
    return log_p.masked_fill_(y <= FLOOR, -torch.inf), log_q.masked_fill_(x <= FLOOR, -torch.inf)
