# Copyright (c) 2026 the megatron_selfdistill authors. Apache-2.0.
"""The target of a response token, which is the method.

    p = softmax(s)               the student; s: the student's logits of the token
    m = w t + a                  the mix; t: the teacher's logits of the token, w: teacher_weight
    q = softmax(m / k)           the target, a constant: no gradient flows through it
    k : H(q) = H(p), k <= k_max  one k per token; H: the entropy in nats

The anchor a is s, or with anchor=reference the logits r of frozen weights that read the student's own context.  While
the student learns, a mix with s follows the student, and a mix with r stands still.  With match=reference k gives q the
entropy of softmax(r) instead of H(p).

k is the temperature of the mix, and beta = 1 / k is its inverse, for which the code solves.  H(softmax(beta m)) falls
monotonically in beta, from log(number of valid columns) to log(number of ties at the maximum), so there is one root.

This file is the definition, on full rows and by bisection.  `loss/sharded` computes the same on vocabulary shards.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from megatron_selfdistill.choices import ANCHORS, TARGET_RULES
from megatron_selfdistill.loss.status import MIN_ENTROPY, status_given, token_status

RANGE = 16.0
"""The factor by which beta may lie above or below 1 / (1 + w), its value where teacher and student are equal."""


@dataclass(frozen=True)
class Target:
    """The choice of a target distribution: the section ``target`` of the configuration."""

    rule: str = "entropy_matched"
    """The way to k: entropy_matched (per token, H(q) = H(p)), fixed (``k``), batch (``k``, which the run takes from the
    mean entropies of the step before, see `solve_batch_k`) or teacher_alone (q = softmax(t), without a mix)."""
    teacher_weight: float = 0.75
    """w in m = w t + a."""
    k_max: float | str | None = "1 + w"
    """The largest k of entropy_matched and batch; "1 + w" is the k of the geometric mean, None is no bound."""
    k: float | None = None
    """k of fixed and batch; None is 1 + w."""
    anchor: str = "student"
    """The logits a in m = w t + a: student (s) or reference (r)."""
    match: str | None = None
    """The model whose entropy the target has: student or, with anchor=reference, reference; None is the anchor."""

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
        if self.anchor not in ANCHORS or self.match not in (None, "student", self.anchor):
            raise ValueError(
                f"Target.anchor must be one of {', '.join(ANCHORS)}, and Target.match None, student or the anchor; "
                f"got {self.anchor!r} and {self.match!r}."
            )
        if self.is_anchored and self.rule == "teacher_alone":
            raise ValueError("Target.anchor must be student with the rule teacher_alone, whose target is no mix.")

    def with_teacher_weight(self, teacher_weight: float) -> Target:
        """Return the target of tokens with another w: k_max "1 + w" follows w, and k keeps its ratio to 1 + w.

        Raises: ValueError for a k of fixed or a k_max that is a number, which belongs to one w only.
        """
        key, bound = ("k", self.k) if self.rule == "fixed" else ("k_max", self.k_max)
        if isinstance(bound, int | float):
            raise ValueError(
                f"Target.{key} must not be a number where tokens have different teacher weights, since a number "
                f"belongs to one weight; got {bound:g}. Use {'None' if key == 'k' else repr('1 + w') + ' or None'}."
            )
        k = None if self.k is None else self.k * (1 + teacher_weight) / self.geometric_k
        return replace(self, teacher_weight=teacher_weight, k=k)

    @property
    def is_anchored(self) -> bool:
        """Whether the teacher is mixed with a frozen reference."""
        return self.anchor == "reference"

    @property
    def matches_reference(self) -> bool:
        """Whether the entropy that k gives to the target is the reference's."""
        return (self.match or self.anchor) == "reference"

    @property
    def needs_reference_entropy(self) -> bool:
        """Whether k is solved from the reference's entropy: per token, or once per step."""
        return self.matches_reference and self.rule in ("entropy_matched", "batch")

    @property
    def geometric_k(self) -> float:
        """1 + w: with this k, q is the normalised weighted geometric mean of teacher and student."""
        return 1 + self.teacher_weight

    @property
    def k_bound(self) -> float | None:
        """k_max as a number; None without a bound."""
        if isinstance(self.k_max, str):
            return self.geometric_k
        return None if self.k_max is None else float(self.k_max)

    @property
    def given_beta(self) -> float | None:
        """The beta of every token where the rule gives it; None where beta is solved per token."""
        if self.rule == "entropy_matched":
            return None
        return 1.0 if self.rule == "teacher_alone" else 1 / (self.geometric_k if self.k is None else self.k)

    @property
    def mix_weights(self) -> tuple[float, float]:
        """(weight of t, weight of a) in m."""
        return (1.0, 0.0) if self.rule == "teacher_alone" else (self.teacher_weight, 1.0)

    @property
    def lowest_is_bound(self) -> bool:
        """Whether the lowest beta that may be solved for is 1 / k_max rather than the end of the range."""
        return self.k_bound is not None and self.k_bound <= RANGE * self.geometric_k

    @property
    def beta_range(self) -> tuple[float, float]:
        """The lowest and the highest beta that may be solved for."""
        lowest = 1 / self.k_bound if self.k_bound and self.lowest_is_bound else 1 / self.geometric_k / RANGE
        return lowest, 1 / self.geometric_k * RANGE


@dataclass(frozen=True)
class TargetDistribution:
    """log q [..., V] and beta [...] in the dtype of the logits, at least float32; status [...] int64, see `Status`."""

    log_q: Tensor
    beta: Tensor
    status: Tensor


@torch.no_grad()
def mixed_target(
    student_logits: Tensor, teacher_logits: Tensor, target: Target, reference_logits: Tensor | None = None
) -> TargetDistribution:
    """Return the target of every token, with beta by bisection to machine precision; no gradient flows through it.

    Shapes: all logits [..., V], full rows, -inf at columns that do not exist.  float64 gives float64; what is narrower
    than float32 is computed in float32.  A token whose logits hold NaN or +inf has beta NaN and log_q NaN.
    ``reference_logits``: given if and only if the target is anchored to a reference.
    Raises: ValueError if the logits have different shapes, or if the reference's are missing or not asked for.
    """
    if target.is_anchored != (reference_logits is not None):
        raise ValueError(f"mixed_target: reference_logits must be given with anchor=reference only; got {target}.")
    anchor_logits = student_logits if reference_logits is None else reference_logits
    if not student_logits.shape == teacher_logits.shape == anchor_logits.shape:
        raise ValueError(
            "mixed_target: all logits must have one shape; got "
            f"{tuple(student_logits.shape)}, {tuple(teacher_logits.shape)} and {tuple(anchor_logits.shape)}."
        )
    dtype = torch.promote_types(torch.promote_types(student_logits.dtype, teacher_logits.dtype), torch.float32)
    student, teacher, anchor = (logits.to(dtype) for logits in (student_logits, teacher_logits, anchor_logits))
    mix = mixed_logits(anchor, teacher, *target.mix_weights)
    wanted = entropy((anchor if target.matches_reference else student).log_softmax(-1))
    if target.given_beta is not None:
        beta = torch.full_like(wanted, target.given_beta)
        return TargetDistribution((beta[..., None] * mix).log_softmax(-1), beta, status_given(beta))
    low, high = target.beta_range
    beta = _matching_beta(mix, wanted.clamp(min=MIN_ENTROPY), low, high)
    log_q = (beta[..., None] * mix).log_softmax(-1)
    status = token_status(wanted, entropy(log_q), beta, low, high, target.lowest_is_bound)
    return TargetDistribution(log_q, beta, status)


def mixed_logits(anchor: Tensor, teacher: Tensor, teacher_weight: float, anchor_weight: float) -> Tensor:
    """Return m = w t + a, or t or a alone where the other weight is 0, because 0 * (-inf) is NaN."""
    if anchor_weight == 0:
        return teacher
    return anchor if teacher_weight == 0 else torch.add(anchor, teacher, alpha=teacher_weight)


def unit_mix(anchor: Tensor, teacher: Tensor, teacher_weight: float | Tensor) -> Tensor:
    """Return m / (1 + w) = (w t + a) / (1 + w) in float32, of logits or of hidden states, [T, n] each.

    teacher_weight: w of all tokens, or [T] the w of each token.
    """
    if not isinstance(teacher_weight, Tensor):
        return mixed_logits(anchor.float(), teacher, teacher_weight, 1.0).div_(1 + teacher_weight)
    weight = teacher_weight.float()[:, None]
    return torch.where(weight > 0, weight * teacher, 0.0).add_(anchor).div_(1 + weight)


def entropy(log_probs: Tensor) -> Tensor:
    """Return H in nats over the last axis; a column whose log-probability is -inf adds nothing."""
    return -(log_probs.exp() * log_probs.clamp(min=torch.finfo(log_probs.dtype).min)).sum(-1)


def _matching_beta(mix: Tensor, wanted: Tensor, low: float, high: float) -> Tensor:
    """Return the beta in [low, high] with H(softmax(beta mix)) = wanted, or the nearer end; NaN for rows with NaN."""

    def too_soft(beta: Tensor) -> Tensor:
        return entropy((beta[..., None] * mix).log_softmax(-1)) > wanted

    lowest, highest = torch.full_like(wanted, low), torch.full_like(wanted, high)
    below, above = ~too_soft(lowest), too_soft(highest)
    left, right = lowest.log(), highest.log()
    for _ in range(60):  # log(high / low) <= 5.6, so 60 halvings reach 5e-18
        middle = (left + right) / 2
        soft = too_soft(middle.exp())
        left, right = torch.where(soft, middle, left), torch.where(soft, right, middle)
    beta = torch.where(below, lowest, torch.where(above, highest, ((left + right) / 2).exp()))
    # Comparisons with NaN are false and would turn NaN into an ordinary number.
    return torch.where(torch.isfinite(wanted + mix.amax(-1)), beta, torch.nan)
