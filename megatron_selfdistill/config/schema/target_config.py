# Copyright (c) 2026 the megatron_selfdistill authors. Apache-2.0.
"""The sections target and teacher: the distribution that the student is trained towards."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from megatron_selfdistill.choices import TARGET_RULES, TEACHER_OFFLOADS, TEACHER_WEIGHTS
from megatron_selfdistill.config.schema.field_checks import at_least, normalise, one_of, require


@dataclass(frozen=True)
class TargetConfig:
    """The mixed target q = softmax((w * l_teacher + l_student) / k)."""

    rule: str = "entropy_matched"
    """How k is found: entropy_matched (per token), fixed, batch (one k per step), or teacher_alone (no
    mix)."""
    teacher_weight: float = 0.75
    """w, the weight of the teacher's logits; the student's weight is 1."""
    k_max: Any = "1 + w"
    """Upper bound of k: '1 + w', a number, or null (the strict match)."""
    k: float | None = None
    """k of the rule fixed; null is 1 + w."""

    def __post_init__(self) -> None:
        normalise("target", self)
        one_of("target.rule", self.rule, TARGET_RULES)
        at_least(0, "target", self, "teacher_weight")
        number = isinstance(self.k_max, int | float) and not isinstance(self.k_max, bool)
        require(
            self.k_max is None or self.k_max == "1 + w" or (number and self.k_max > 0),
            f"target.k_max must be '1 + w', a positive number or null, got {self.k_max!r}",
        )
        require(self.k is None or self.k > 0, f"target.k must be positive or null, got {self.k}")


@dataclass(frozen=True)
class TeacherConfig:
    """Which weights read the response next to the solution."""

    weights: str = "frozen"
    """frozen (those at the start of the run), ema (their moving average) or current (the student's own)."""
    ema_decay: float = 0.99
    """Decay per optimizer step of the moving average."""
    offload: str = "none"
    """none, or cpu: the teacher's weights rest in host memory between steps."""

    def __post_init__(self) -> None:
        normalise("teacher", self)
        one_of("teacher.weights", self.weights, TEACHER_WEIGHTS)
        one_of("teacher.offload", self.offload, TEACHER_OFFLOADS)
        require(0 <= self.ema_decay < 1, f"teacher.ema_decay must lie in [0, 1), got {self.ema_decay}")
