# Copyright (c) 2026 the megatron_selfdistill authors. Apache-2.0.
"""Runs whose anchor follows the student: it is refreshed every so many steps, or averages the student's weights.

The trainer has no setting for either; these runs measure what an anchor loses when it moves.
Teacher and reference are one copy, as they are by default, so both readings of the target follow.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from _lib.pretraining import Base
from _lib.variants import Variant
from _lib.watched_runs import Point, watch

if TYPE_CHECKING:  # torch and Megatron are imported by the functions that need them, so that --help answers at once
    from megatron_selfdistill.trainer import Trainer

EVERY = 100
"""Steps after which a refreshed anchor takes over the student's weights."""
AVERAGED = ("teacher.weights=ema", "teacher.ema_decay=0.99")
"""Overrides of a run whose teacher, and with it the anchor, is an average of the student's last hundred steps."""


def refresh(trainer: Trainer, step: int) -> None:
    """Give the frozen copy the student's weights every `EVERY` steps."""
    if step and step % EVERY == 0:
        assert trainer.learner.teachers.reference is trainer.learner.teachers.start
        trainer.learner.teachers.start.copy_student()


def follow_average(trainer: Trainer, step: int) -> None:
    """Let the averaged teacher serve as reference, too, from the first step on."""
    if step == 0:
        assert trainer.learner.teachers.start.weights == "ema"
        trainer.learner.teachers.reference = trainer.learner.teachers.start


def watch_refreshed(variant: Variant, base: Base, run_dir: Path, steps: Sequence[int], num_samples: int) -> list[Point]:
    """Train a variant whose anchor follows the student, and return its points as `watch` does."""
    averaged = AVERAGED[0] in variant.overrides
    before_step: Callable[[Trainer, int], None] = follow_average if averaged else refresh
    return watch(variant, base, run_dir, steps, num_samples=num_samples, before_step=before_step)
