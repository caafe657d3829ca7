# Copyright (c) 2026 the megatron_selfdistill authors. Apache-2.0.
"""What a target and a divergence are chosen by, the mix of logits, and the check of the loss's arguments.

`definition` says what the choices mean.  `Status` tells how the beta of a token came about.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, replace
from enum import IntEnum
from numbers import Real
from typing import Any

import torch
from torch import Tensor

from megatron_selfdistill.choices import ANCHORS, DIVERGENCES, MAX_RENYI_ORDER, TARGET_RULES

MIN_ENTROPY = 1e-6
"""The smallest entropy, in nats, that determines a beta.  A smaller H(p) is rounding noise: this value is matched."""
MATCH_TOLERANCE = 1e-5
"""The largest |H(q) - H(p)|, in nats, at which a token counts as matched."""


class Status(IntEnum):
    """The way in which the beta of one response token came about."""

    MATCHED = 0
    """H(q) = H(p)."""
    CAPPED = 1
    """k = k_max; the k that matches the entropies is larger."""
    OUT_OF_RANGE = 2
    """The beta that matches the entropies lies outside the range of betas; beta is the nearer end of the range."""
    UNDETERMINED = 3
    """H(p) is below MIN_ENTROPY (or NaN), where almost every beta matches; beta matches MIN_ENTROPY."""
    GIVEN = 4
    """The rule gives beta and solves nothing: fixed, batch, teacher_alone."""
    UNCONVERGED = 5
    """The beta that matches the entropies lies inside the range and is not reached: |H(q) - H(p)| at the beta in use is
    above MATCH_TOLERANCE, or no bound of it is known."""


def status_given(beta: Tensor) -> Tensor:
    """Return `Status.GIVEN` for every token: int64, the shape of beta."""
    return torch.full(beta.shape, int(Status.GIVEN), dtype=torch.int64, device=beta.device)


def token_status(
    wanted_entropy: Tensor,
    target_entropy: Tensor,
    beta: Tensor,
    low: float,
    high: float,
    lowest_is_bound: bool,
    unconverged: Tensor | None = None,
) -> Tensor:
    """Return the status of tokens whose beta was solved for within [low, high]: int64, the shape of beta.

    wanted_entropy: the entropy that beta is to give to the target.
    lowest_is_bound: whether ``low`` is 1 / k_max.
    unconverged: bool, the tokens whose root lies inside the range and was not reached; None if the solver reaches every
    root.
    """
    apart = (target_entropy - wanted_entropy).abs() > MATCH_TOLERANCE
    at_low, at_high = apart & (beta <= low), apart & (beta >= high)
    status = torch.full(beta.shape, int(Status.MATCHED), dtype=torch.int64, device=beta.device)
    status.masked_fill_(at_low, int(Status.CAPPED if lowest_is_bound else Status.OUT_OF_RANGE))
    status.masked_fill_(at_high, int(Status.OUT_OF_RANGE))
    if unconverged is not None:
        status.masked_fill_(unconverged, int(Status.UNCONVERGED))
    determined = (wanted_entropy >= MIN_ENTROPY) & torch.isfinite(beta)
    return status.masked_fill_(~determined, int(Status.UNDETERMINED))


RANGE = 16.0
"""The factor by which beta may lie above or below 1 / (1 + w), its value where teacher and student are equal."""


@dataclass(frozen=True)
class Target:
    """The choice of a target distribution: the section ``target`` of the configuration."""

    rule: str = "entropy_matched"
    """The way to k: entropy_matched (per token, see ``match``), fixed (``k``), batch (``k``, which the run takes from
    the mean entropies of the step before, see `solve_batch_k`) or teacher_alone (q = softmax(t), without a mix)."""
    teacher_weight: float = 0.75
    """w in m = w t + a."""
    k_max: float | str | None = "1 + w"
    """The largest k of entropy_matched and batch; "1 + w" is the k of the geometric mean, None is no bound."""
    k: float | None = None
    """k of fixed and batch; None is 1 + w."""
    anchor: str | float = "reference"
    """The logits a in m = w t + a: reference (r), student (s), which suits hints that are all one text, or the share l
    of the reference in (1 - l) s + l r, a number, with which a moving anchor stays tied to the start."""
    match: str | None = None
    """The model whose entropy the target has: student or, with anchor=reference, reference; None is the anchor."""
    num_controls: int = 0
    """K, the number of controls: with controls m = w (t - c) + a, where c is the log of the mean of the probabilities
    that K controls give; without (0) m = w t + a."""

    @classmethod
    def configured(cls, section: Any, batch_k: float | None = None, num_controls: int = 0) -> Target:
        """Return the target of the ``section`` target of a configuration.

        ``batch_k``: the k that the rule "batch" has solved for this step; None before the first solution.
        ``num_controls``: those of the run's data (`data.controls.num_controls`).  An anchor that no data have decided
        (auto) is the reference.
        """
        k = batch_k if section.rule == "batch" else section.k
        values = {name: getattr(section, name) for name in ("rule", "teacher_weight", "k_max", "anchor", "match")}
        if section.anchor == "auto":
            values["anchor"] = "reference"
        return cls(k=k, num_controls=num_controls, **values)

    def __post_init__(self) -> None:
        if self.rule not in TARGET_RULES:
            raise ValueError(f"Target.rule must be one of {', '.join(TARGET_RULES)}; got {self.rule!r}.")
        if not (isinstance(self.teacher_weight, Real) and 0 <= self.teacher_weight < math.inf):
            raise ValueError(f"Target.teacher_weight must be a finite number >= 0; got {self.teacher_weight}.")
        if not (self.k_max is None or self.k_max == "1 + w" or isinstance(self.k_max, Real)):
            raise ValueError(f"Target.k_max must be '1 + w', a number or None; got {self.k_max!r}.")
        smallest = self.geometric_k / RANGE
        if self.k_bound is not None and not self.k_bound > smallest:
            raise ValueError(
                f"Target.k_max must be above (1 + w) / {RANGE:g} = {smallest:g}, or no k is left; "
                f"got {self.k_bound:g}. Use a larger k_max, or None for no bound."
            )
        if self.k is not None and not (
            self.rule in ("fixed", "batch") and isinstance(self.k, Real) and 0 < self.k < math.inf
        ):
            raise ValueError(f"Target.k must be a finite number > 0 of fixed or batch; got {self.k} with {self.rule}.")
        if not (self.anchor in ANCHORS or (isinstance(self.anchor, Real) and 0 < self.anchor < 1)) or (
            self.match not in (None, "student", self.anchor)
        ):
            raise ValueError(
                f"Target.anchor must be one of {', '.join(ANCHORS)} or a number between 0 and 1, and Target.match "
                f"None, student or the anchor; got {self.anchor!r} and {self.match!r}."
            )
        if self.has_reference and self.rule == "teacher_alone":
            raise ValueError("Target.anchor must be student with the rule teacher_alone, whose target is no mix.")
        if self.num_controls < 0 or (self.num_controls and self.rule == "teacher_alone"):
            raise ValueError(
                "Target.num_controls must be at least 0, and 0 with the rule teacher_alone, whose target is no mix; "
                f"got {self.num_controls} with {self.rule}."
            )

    def with_teacher_weight(self, teacher_weight: float) -> Target:
        """Return the target of tokens with another w, which a k_max "1 + w" and a k of None follow.

        Raises: ValueError for a k or a k_max of the rule that is a number, which belongs to one w only.
        """
        key, bound = ("k_max", self.k_max) if self.rule == "entropy_matched" else ("k", self.k)
        if isinstance(bound, int | float):
            raise ValueError(
                f"Target.{key} must not be a number where tokens have different teacher weights, since a number "
                f"belongs to one weight; got {bound:g}. Use {'None' if key == 'k' else repr('1 + w') + ' or None'}."
            )
        return replace(self, teacher_weight=teacher_weight)

    @property
    def is_anchored(self) -> bool:
        """Whether the teacher is mixed with a frozen reference."""
        return self.anchor == "reference"

    @property
    def reference_share(self) -> float:
        """The share l of the reference in an anchor that is the student otherwise; 0 for other anchors."""
        return 0.0 if isinstance(self.anchor, str) else float(self.anchor)

    @property
    def has_reference(self) -> bool:
        """Whether the anchor is a frozen reference, or has a share of one."""
        return self.is_anchored or self.reference_share > 0

    @property
    def reads_teacher(self) -> bool:
        """Whether the loss takes the teacher's own logits; with a reference or a control the caller combines them."""
        return not (self.has_reference or self.num_controls)

    @property
    def matches_reference(self) -> bool:
        """Whether the entropy that k gives to the target is that of an anchor with a reference, not the student's."""
        return self.has_reference and self.match != "student"

    @property
    def needs_reference_entropy(self) -> bool:
        """Whether k is solved from an entropy other than the student's: per token, or once per step."""
        return self.matches_reference and self.rule in ("entropy_matched", "batch")

    @property
    def geometric_k(self) -> float:
        """The sum of the weights of the logits in m: 1 + w, and 1 with controls, since w t and -w c cancel.

        With this k, equal logits give q = softmax(a); q is the normalised weighted geometric mean of the models.
        """
        return 1.0 if self.num_controls else 1 + self.teacher_weight

    @property
    def k_bound(self) -> float | None:
        """k_max as a number; None without a bound."""
        if isinstance(self.k_max, str):
            return self.geometric_k
        return None if self.k_max is None else float(self.k_max)

    @property
    def given_beta(self) -> float | None:
        """The beta of every token where the rule gives it; None if beta is solved per token."""
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


def mixed_logits(anchor: Tensor, teacher: Tensor, teacher_weight: float, anchor_weight: float) -> Tensor:
    """Return m = w t + a, or t or a alone where the other weight is 0, because 0 * (-inf) is NaN."""
    if anchor_weight == 0:
        return teacher
    return anchor if teacher_weight == 0 else torch.add(anchor, teacher, alpha=teacher_weight)


def unit_mix(anchor: Tensor, teacher: Tensor, teacher_weight: float | Tensor, *, is_contrast: bool = False) -> Tensor:
    """Return m / (1 + w) = (w t + a) / (1 + w) in float32, of logits or of hidden states, [T, n] each.

    teacher_weight: w of all tokens, or [T] the w of each token.
    is_contrast: whether ``teacher`` is the contrast t - c with controls, for one w; then the result is w (t - c) + a.
    """
    if not isinstance(teacher_weight, Tensor):
        unit = 1.0 if is_contrast else 1 + teacher_weight
        return mixed_logits(anchor.float(), teacher, teacher_weight, 1.0).div_(unit)
    weight = teacher_weight.float()[:, None]
    return torch.where(weight > 0, weight * teacher, 0.0).add_(anchor).div_(1 + weight)


@dataclass(frozen=True)
class Divergence:
    """The divergence that pulls the student p towards the constant target q.

    kind: "reverse_kl" is KL(p || q) = KL(student || target); "forward_kl" is KL(q || p) = KL(target || student); "jsd"
    is lam KL(q || M) + (1 - lam) KL(p || M) with M = lam q + (1 - lam) p.
    jsd_lambda: lam, strictly between 0 and 1.
    forward_above: nats, with reverse_kl only: where H(q) of a token is above this number, the divergence is KL(p || q)
    + KL(q || p).  None: KL(p || q) for every token.
    order: the order alpha of the Renyi divergence that stands in the place of KL, with reverse_kl and forward_kl only;
    D(p || q) = log(sum p^alpha q^(1 - alpha)) / (alpha - 1), or with forward_kl the same of q and p.  1 is KL.
    """

    kind: str = "reverse_kl"
    jsd_lambda: float = 0.5
    forward_above: float | None = None
    order: float = 1.0

    @classmethod
    def configured(cls, loss: Any, method: Any) -> Divergence:
        """Return the divergence of the sections ``loss`` and ``method`` of a configuration."""
        return cls(loss.divergence, loss.jsd_lambda, **method.divergence_numbers)

    def __post_init__(self) -> None:
        if self.kind not in DIVERGENCES:
            raise ValueError(f"Divergence.kind must be one of {', '.join(DIVERGENCES)}; got {self.kind!r}.")
        if not (isinstance(self.jsd_lambda, Real) and 0 < self.jsd_lambda < 1):
            raise ValueError(
                f"Divergence.jsd_lambda must lie strictly between 0 and 1; got {self.jsd_lambda}. "
                "Use reverse_kl or forward_kl instead of 0 or 1, at which the JSD is 0 for every p."
            )
        above = self.forward_above
        if above is not None and not (self.kind == "reverse_kl" and isinstance(above, Real) and above == above):
            raise ValueError(
                "Divergence.forward_above must be None or a number with the kind reverse_kl, to which it adds forward "
                f"KL; got {self.forward_above} with {self.kind}."
            )
        if not (isinstance(self.order, Real) and 0 < self.order <= MAX_RENYI_ORDER) or (
            self.is_renyi and (self.kind == "jsd" or self.forward_above is not None)
        ):
            raise ValueError(
                f"Divergence.order must be above 0 and at most {MAX_RENYI_ORDER:g}, and 1 with jsd and with "
                f"forward_above; got {self.order} with {self.kind} and forward_above={self.forward_above}."
            )

    @property
    def is_renyi(self) -> bool:
        """Whether the divergence is a Renyi divergence other than KL."""
        return self.order != 1

    @property
    def student_power(self) -> float:
        """The number b in the sum of p^b q^(1 - b) of the Renyi divergence."""
        return self.order if self.kind == "reverse_kl" else 1 - self.order

    @property
    def needs_forward_kl(self) -> bool:
        """Whether KL(q || p) is a part of the divergence, for some tokens at least."""
        return (self.kind == "forward_kl" and not self.is_renyi) or self.forward_above is not None


_AXES = {
    name: axes
    for names, axes in {
        "student_logits teacher_logits reference_logits own_teacher_logits logits log_p log_q": "... V",
        "control_logits": "K ... V",
        "student_hidden teacher_hidden reference_hidden": "... h",
        "control_hidden": "K ... h",
        "student_weight teacher_weight reference_weight": "V h",
        "labels_or_mask response_tokens gather_indices beta reference_entropy teacher_weights": "...",
    }.items()
    for name in names.split()
}
"""Argument -> its axes, of which one name has one size in a call; ``...`` are any leading axes, or the axis of tokens
where the call has a VocabShard."""


def check_arguments(caller: str, given: Mapping[str, Any], **other_axes: str) -> None:
    """Raise ValueError, which names the argument, for a tensor of other axes, which torch might broadcast.

    caller: the public function.  given: its arguments by name: ``locals()`` where the function begins; None is none.
    other_axes: entries that this function has in place of those of `_AXES`.
    """
    known: dict[str, Any] = {"V": given["vocab"].size} if "vocab" in given else {}
    for name, value in given.items():
        if value is None or not (axes := (other_axes.get(name) or _AXES.get(name, "")).split()):
            continue
        if hasattr(value, "to_local"):
            raise ValueError(f"{caller}: {name} must be the tensor of one process; got a DTensor: pass its to_local().")
        axes, sizes = ["T" if axis == "..." and "vocab" in given else axis for axis in axes], list(value.shape)
        if "..." in axes:
            start, free = axes.index("..."), max(0, len(sizes) - len(axes) + 1)
            sizes[start : start + free] = [tuple(sizes[start : start + free])]
        fits = (known.setdefault(axis, size) == size for axis, size in zip(axes, sizes, strict=False))
        if len(sizes) != len(axes) or not all(fits):
            wanted = ", ".join(str(known.get(axis, axis)).strip("(),") for axis in axes)
            found = list(value.shape)
            raise ValueError(f"{caller}: {name} must be [{wanted}], row by row for the same tokens; got {found}.")


def check_controls(caller: str, name: str, controls: Tensor | None, target: Target) -> None:
    """Raise ValueError, which names the argument, unless it holds the K controls of the target."""
    given = 0 if controls is None else len(controls)
    if given != target.num_controls:
        raise ValueError(
            f"{caller}: {name} must hold Target.num_controls = {target.num_controls} controls along its first axis, or "
            f"be None for 0; got {given}."
        )
