# Copyright (c) 2026 the megatron_selfdistill authors. Apache-2.0.
"""The target distribution q of every response token, on full rows: the definition of what the loss computes.

    m = w t + s        s, t: logits of student and teacher at the same token; w = teacher_weight
    q = softmax(m / k)
    k : H(q) = H(p),   p = softmax(s),   k <= k_max

Inside, beta = 1 / k is the unknown.  H(softmax(beta m)) falls monotonically from log(number of valid columns)
to log(number of ties at the maximum), so the root is unique.  Entropies are in nats.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from enum import IntEnum
from itertools import pairwise

import torch
from torch import Tensor

from megatron_selfdistill.choices import TARGET_RULES

RANGE = 16.0
"""beta (1 + w) stays within [1 / RANGE, RANGE]; also the span of the grid of betas."""
MIN_ENTROPY = 1e-6
"""Nats.  A smaller entropy is rounding noise and determines no beta: this entropy is matched instead."""
MATCH_TOLERANCE = 1e-5
"""Nats.  A token counts as matched when its entropies agree to this."""


class Status(IntEnum):
    """How the beta of one response token came about."""

    MATCHED = 0
    """H(q) = H(p)."""
    CAPPED = 1
    """k = k_max: matching would make q softer than that."""
    OUT_OF_RANGE = 2
    """The root lies beyond the range of betas; beta is the nearer end."""
    UNDETERMINED = 3
    """H(p) is below MIN_ENTROPY (or NaN): almost any beta would do, and MIN_ENTROPY is matched."""
    GIVEN = 4
    """The rule gives beta and solves nothing: fixed, batch, teacher_alone."""
    UNCONVERGED = 5
    """A root lies within the range of betas, and |H(q) - H(p)| at the beta in use is above MATCH_TOLERANCE, or no bound
    of it is known."""


@dataclass(frozen=True)
class Target:
    """Which target distribution the student is pulled towards.

    rule: "entropy_matched" (one k per token), "fixed" (k of this record), "batch" (k solved from the mean
        entropies of the step before, see ``solve_batch_k``, and put into ``k``) or "teacher_alone"
        (q = softmax(t)).
    teacher_weight: w in m = w t + s.
    k_max: upper bound of k for entropy_matched and batch; "1 + w" is never softer than the geometric mean;
        None is no bound.
    k: k for fixed and batch; None is 1 + w, which is also the value of step 0 under batch.
    """

    rule: str = "entropy_matched"
    teacher_weight: float = 0.75
    k_max: float | str | None = "1 + w"
    k: float | None = None

    def __post_init__(self) -> None:
        if self.rule not in TARGET_RULES:
            raise ValueError(f"Target.rule must be one of {', '.join(TARGET_RULES)}; got {self.rule!r}.")
        if not (math.isfinite(self.teacher_weight) and self.teacher_weight >= 0):
            raise ValueError(f"Target.teacher_weight must be a finite number >= 0; got {self.teacher_weight}.")
        if isinstance(self.k_max, str) and self.k_max != "1 + w":
            raise ValueError(f"Target.k_max must be '1 + w', a number or None; got {self.k_max!r}.")
        smallest = self.geometric_k / RANGE
        if self.k_bound is not None and not self.k_bound > smallest:
            raise ValueError(
                f"Target.k_max must be above (1 + w) / {RANGE:g} = {smallest:g}, or no k is left; "
                f"got {self.k_bound:g}. Use a larger k_max, or None for no bound."
            )
        if self.k is not None and not (math.isfinite(self.k) and self.k > 0):
            raise ValueError(f"Target.k must be a finite number > 0, or None for 1 + w; got {self.k}.")

    @property
    def geometric_k(self) -> float:
        """1 + w: q is then the normalised weighted geometric mean of teacher and student."""
        return 1 + self.teacher_weight

    @property
    def k_bound(self) -> float | None:
        """k_max as a number; None without a bound."""
        if isinstance(self.k_max, str):
            return self.geometric_k
        return None if self.k_max is None else float(self.k_max)

    @property
    def given_beta(self) -> float | None:
        """The beta of every token where the rule gives it; None where it is solved per token."""
        if self.rule == "entropy_matched":
            return None
        return 1.0 if self.rule == "teacher_alone" else 1 / (self.geometric_k if self.k is None else self.k)

    @property
    def mix_weights(self) -> tuple[float, float]:
        """(weight of t, weight of s) in m."""
        return (1.0, 0.0) if self.rule == "teacher_alone" else (self.teacher_weight, 1.0)

    @property
    def lowest_is_bound(self) -> bool:
        """Whether the lowest beta of the grid is 1 / k_max rather than the end of the range."""
        return self.k_bound is not None and self.k_bound <= RANGE * self.geometric_k


@dataclass(frozen=True)
class TargetRows:
    """log_q [..., V] and beta [...] in the dtype of the logits, at least float32; status [...] int64."""

    log_q: Tensor
    beta: Tensor
    status: Tensor


def mixed_target(student_logits: Tensor, teacher_logits: Tensor, target: Target) -> TargetRows:
    """The target of every row, by bisection to machine precision.

    Shapes: both logits [..., V], full rows, -inf at columns that do not exist.  float64 in, float64 out;
    narrower than float32 is
    computed in float32.  The result is a constant: no gradient flows.
    A row whose logits hold NaN or +inf has beta NaN and a log_q of NaN.
    """
    if student_logits.shape != teacher_logits.shape:
        raise ValueError(
            "mixed_target: student_logits and teacher_logits must have one shape; "
            f"got {tuple(student_logits.shape)} and {tuple(teacher_logits.shape)}."
        )
    dtype = torch.promote_types(torch.promote_types(student_logits.dtype, teacher_logits.dtype), torch.float32)
    with torch.no_grad():
        student, teacher = student_logits.to(dtype), teacher_logits.to(dtype)
        mix = mixed_logits(student, teacher, *target.mix_weights)
        student_entropy = entropy(student.log_softmax(-1))
        if target.given_beta is not None:
            beta = torch.full_like(student_entropy, target.given_beta)
            return TargetRows((beta[..., None] * mix).log_softmax(-1), beta, status_given(beta))
        grid = beta_grid(target)
        low, high = grid[0], grid[-1]
        beta = _bisect(mix, student_entropy.clamp(min=MIN_ENTROPY), low, high)
        log_q = (beta[..., None] * mix).log_softmax(-1)
        status = token_status(student_entropy, entropy(log_q), beta, low, high, target.lowest_is_bound)
        return TargetRows(log_q, beta, status)


def mixed_logits(student: Tensor, teacher: Tensor, teacher_weight: float, student_weight: float) -> Tensor:
    """w t + s, or one of the two alone: 0 * (-inf) would be NaN."""
    if student_weight == 0:
        return teacher
    return student if teacher_weight == 0 else torch.add(student, teacher, alpha=teacher_weight)


def entropy(log_probs: Tensor) -> Tensor:
    """H in nats over the last axis; a column of log-probability -inf adds nothing."""
    return -(log_probs.exp() * log_probs.clamp(min=torch.finfo(log_probs.dtype).min)).sum(-1)


def _bisect(mix: Tensor, entropy_wanted: Tensor, low: float, high: float) -> Tensor:
    def too_soft(beta: Tensor) -> Tensor:
        return entropy((beta[..., None] * mix).log_softmax(-1)) > entropy_wanted

    lowest, highest = torch.full_like(entropy_wanted, low), torch.full_like(entropy_wanted, high)
    below, above = ~too_soft(lowest), too_soft(highest)
    left, right = lowest.log(), highest.log()
    for _ in range(60):  # log(high / low) <= 5.6, so 60 halvings reach 5e-18
        middle = (left + right) / 2
        soft = too_soft(middle.exp())
        left, right = torch.where(soft, middle, left), torch.where(soft, right, middle)
    beta = torch.where(below, lowest, torch.where(above, highest, ((left + right) / 2).exp()))
    # Comparisons with NaN are false and would turn it into an ordinary number.
    return torch.where(torch.isfinite(entropy_wanted + mix.amax(-1)), beta, torch.nan)


def beta_grid(target: Target) -> tuple[float, ...]:
    """Return the grid of betas, which rise; the first and the last one are the range of beta.

    The values are 1 / (1 + w) times powers of 2, so that equal logits find their root on the grid, from
    1 / (RANGE (1 + w)) to RANGE / (1 + w); with a bound inside that range they start at 1 / k_max.  These are 9 values
    without a bound and 5 with k_max = 1 + w.  Under fixed and teacher_alone the grid is the one given beta.
    """
    if target.rule in ("fixed", "teacher_alone"):
        assert target.given_beta is not None
        return (target.given_beta,)
    octaves = round(math.log2(RANGE))
    # A power of 2 times one number, so that each value is exactly twice the one before.
    grid = [2.0**j * (1 / target.geometric_k) for j in range(-octaves, octaves + 1)]
    if target.k_bound is None or not target.lowest_is_bound:
        return tuple(grid)
    lowest = 1 / target.k_bound
    return (lowest, *(beta for beta in grid if beta > lowest * (1 + 1e-9)))


def status_given(beta: Tensor) -> Tensor:
    """Status.GIVEN for every token."""
    return torch.full(beta.shape, int(Status.GIVEN), dtype=torch.int64, device=beta.device)


def token_status(
    student_entropy: Tensor,
    target_entropy: Tensor,
    beta: Tensor,
    low: float,
    high: float,
    lowest_is_bound: bool,
    unconverged: Tensor | None = None,
) -> Tensor:
    """Return the Status of tokens whose beta was solved for within [low, high]: int64, the shape of beta.

    unconverged: bool, the tokens whose root lies inside the range and has not been reached; None where a solver reaches
    every root.
    """
    apart = (target_entropy - student_entropy).abs() > MATCH_TOLERANCE
    at_low, at_high = apart & (beta <= low), apart & (beta >= high)
    status = torch.full(beta.shape, int(Status.MATCHED), dtype=torch.int64, device=beta.device)
    status.masked_fill_(at_low, int(Status.CAPPED if lowest_is_bound else Status.OUT_OF_RANGE))
    status.masked_fill_(at_high, int(Status.OUT_OF_RANGE))
    if unconverged is not None:
        status.masked_fill_(unconverged, int(Status.UNCONVERGED))
    determined = (student_entropy >= MIN_ENTROPY) & torch.isfinite(beta)
    return status.masked_fill_(~determined, int(Status.UNDETERMINED))


def solve_batch_k(
    mean_student_entropy: float,
    betas: Sequence[float] | Tensor,
    mean_grid_entropies: Sequence[float] | Tensor,
    k_max: float | None,
    *,
    max_entropy: float = math.inf,
) -> float:
    """Estimate, for the rule "batch", the one k at which the mean entropies of mix and student are equal.

    ``mean_grid_entropies[j]`` is the mean over tokens of H(softmax(betas[j] m)), as in
    ``TokenStats.grid_entropies``; betas rise.  The mean entropy of the mix is known at these betas alone.  Between them
    the logit-entropy log H - log(1 - H / max_entropy) is interpolated over log beta by a monotone cubic (Fritsch and
    Carlson 1980).  The mean entropy at k is therefore exact at grid points and elsewhere as good as that curve: on the
    classes of ``solver_accuracy.py`` within 0.02 nats where student and teacher are alike, and within 0.25 nats
    where all tokens melt from a few columns into the bulk, or settle on a plateau, in one cell of the grid.  The rule
    uses k for the tokens of the next step, which differ by more.
    ``max_entropy``: log of the number of valid columns; without it the scale is log H.  Beyond the grid, k is that of
    the nearer end; it never exceeds ``k_max``.  All entropies in nats.
    Raises: ValueError for means that are not finite, or of another number than the betas.
    """
    positions = torch.as_tensor(betas, dtype=torch.float64, device="cpu").log()
    entropies = torch.as_tensor(mean_grid_entropies, dtype=torch.float64, device="cpu")
    if positions.shape != entropies.shape or positions.numel() < 2:
        raise ValueError(
            "solve_batch_k: betas and mean_grid_entropies must be equally long, at least 2; "
            f"got {positions.numel()} and {entropies.numel()}."
        )
    wanted = torch.tensor(float(mean_student_entropy), dtype=torch.float64)
    if not (torch.isfinite(wanted) and torch.isfinite(entropies).all()):
        raise ValueError(
            f"solve_batch_k: mean entropies must be finite; got {float(wanted)} and {entropies.tolist()}. "
            "Leave rows with NaN out of the means."
        )
    heights = _logit(entropies, max_entropy) - _logit(wanted.clamp(min=MIN_ENTROPY), max_entropy)
    heights = heights.cummin(0).values  # the entropies fall by law; rounding may say otherwise
    k = math.exp(-_monotone_cubic_root(positions.tolist(), heights.tolist()))
    return k if k_max is None else min(k, k_max)


def _logit(entropies: Tensor, max_entropy: float) -> Tensor:
    return entropies.clamp(min=1e-30).log() - (1 - entropies / max_entropy).clamp(min=1e-12).log()


def _monotone_cubic_root(positions: list[float], heights: list[float]) -> float:
    """Where the monotone cubic through falling heights is 0; the nearer end if nowhere."""
    if heights[0] <= 0:
        return positions[0]
    if heights[-1] >= 0:
        return positions[-1]
    cell = sum(height > 0 for height in heights) - 1
    widths = [b - a for a, b in pairwise(positions)]
    secants = [(b - a) / h for a, b, h in zip(heights, heights[1:], widths, strict=False)]

    def slope(i: int) -> float:
        if i in (0, len(secants)):
            return secants[min(i, len(secants) - 1)]
        before, after = secants[i - 1], secants[i]
        return 2 * before * after / (before + after) if before * after > 0 else 0.0

    width, start, end = widths[cell], heights[cell], heights[cell + 1]
    first, last = slope(cell) * width, slope(cell + 1) * width
    left, right = 0.0, 1.0
    for _ in range(60):
        x = (left + right) / 2
        value = start + x * (
            first + x * (3 * (end - start) - 2 * first - last + x * (2 * (start - end) + first + last))
        )
        left, right = (x, right) if value > 0 else (left, x)
    return positions[cell] + width * (left + right) / 2
