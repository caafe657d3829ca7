# Copyright (c) 2026 the megatron_selfdistill authors. Apache-2.0.
"""The sections ``target`` and ``teacher`` of the schema: the distribution that the student is trained towards."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from megatron_selfdistill.choices import ANCHORS, TARGET_RULES, TEACHER_OFFLOADS, TEACHER_WEIGHTS
from megatron_selfdistill.config.schema.field_checks import at_least, normalise, one_of, require


@dataclass(frozen=True)
class TargetConfig:
    """The target q = softmax((w * teacher_logits + anchor_logits) / k)."""

    rule: str = "entropy_matched"
    """The rule for k, the temperature of the mix: entropy_matched (per token), fixed, batch (one k per step), or
    teacher_alone (no mix: the target is the teacher)."""
    teacher_weight: float = 0.75
    """Weight w of the teacher's logits; the weight of the anchor's logits is 1."""
    guided_teacher_weight: float | None = None
    """Weight w for the tokens of guided problems (rollout.guidance=mixed; with rollout.guide_below the problems below
    it), whose guided responses are also sampled with it; null is teacher_weight.  Needs anchor=reference, and k_max and
    k that are not numbers."""
    k_max: Any = "1 + w"
    """Upper bound of k: '1 + w', a number, or null (no bound: the entropies always match)."""
    k: float | None = None
    """The value of k under rule=fixed; null is 1 + w."""
    anchor: str = "reference"
    """The model that the teacher is mixed with, on the student's context: reference (the weights at the start of the
    run, so that the target stands still with a frozen teacher, whose weights are also the reference's; with another
    teacher the reference is one more copy of the weights) or student (the weights that are trained)."""
    match: str | None = None
    """The model whose entropy the target has: reference (needs anchor=reference) or student; null is the anchor."""

    def __post_init__(self) -> None:
        normalise("target", self)
        one_of("target.rule", self.rule, TARGET_RULES)
        at_least(0, "target", self, "teacher_weight guided_teacher_weight")
        number = isinstance(self.k_max, int | float) and not isinstance(self.k_max, bool)
        require(
            self.k_max is None or self.k_max == "1 + w" or (number and self.k_max > 0),
            f"target.k_max must be '1 + w', a positive number or null, got {self.k_max!r}",
        )
        require(self.k is None or self.k > 0, f"target.k must be positive or null, got {self.k}")
        one_of("target.anchor", self.anchor, ANCHORS)
        require(
            self.match in (None, "student", self.anchor),
            f"target.match must be null, student or target.anchor, got {self.match!r} with target.anchor={self.anchor}",
        )
        require(
            self.anchor == "student" or self.rule != "teacher_alone",
            "target.rule=teacher_alone mixes the teacher with nothing: set target=teacher_alone, which also sets "
            "target.anchor=student",
        )
        if self.guided_teacher_weight is not None:
            self._check_guided_teacher_weight()

    def _check_guided_teacher_weight(self) -> None:
        require(
            self.anchor == "reference",
            "target.guided_teacher_weight needs target.anchor=reference: a mix with the current student has one "
            "target.teacher_weight",
        )
        key, value = ("k", self.k) if self.rule == "fixed" else ("k_max", self.k_max)
        require(
            value is None or isinstance(value, str),
            f"target.{key}={value} belongs to one teacher weight, and target.guided_teacher_weight sets another: "
            f"set target.{key}=null" + (" or '1 + w'" if key == "k_max" else ""),
        )


@dataclass(frozen=True)
class TeacherConfig:
    """The weights that score the response with the solution in their context."""

    weights: str = "frozen"
    """The teacher's weights: frozen (the weights at the start of the run, also those of the reference), ema (a moving
    average of the student's weights) or current (the student's weights themselves).  Beside ema and current, the
    reference of target.anchor=reference is a copy of the weights of its own."""
    ema_decay: float = 0.99
    """Decay of the moving average per optimizer step."""
    offload: str = "none"
    """The place of the teacher's weights, and of a reference's own copy, between steps: none (on the device) or cpu (in
    host memory)."""

    def __post_init__(self) -> None:
        normalise("teacher", self)
        one_of("teacher.weights", self.weights, TEACHER_WEIGHTS)
        one_of("teacher.offload", self.offload, TEACHER_OFFLOADS)
        require(0 <= self.ema_decay < 1, f"teacher.ema_decay must lie in [0, 1), got {self.ema_decay}")
