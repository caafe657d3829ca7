# Copyright (c) 2026 the megatron_selfdistill authors. Apache-2.0.
"""Variants of training: each variant is one run of the trainer from a base model, measured after the run.

A variant is a list of overrides for ``selfdistill --config-name quickstart``; `run_variant` prints the command that
repeats the run by hand.
"""

from __future__ import annotations

import dataclasses
import shutil
import time
from dataclasses import dataclass
from pathlib import Path

from _lib.command_line import CONFIG_NAME, command, console
from _lib.measurement import Measurement, measure
from _lib.pretraining import Base
from megatron_selfdistill import config as configuration
from megatron_selfdistill.train import EXIT_UNHEALTHY, train


@dataclass(frozen=True)
class Variant:
    """A way to train: a title and the overrides of the configuration."""

    title: str
    overrides: tuple[str, ...] = ()

    def on(self, problems: Path, *settings: str) -> Variant:
        """Return this variant with a file of problems and further overrides, which come last."""
        return dataclasses.replace(self, overrides=(f"data.path={problems}", *self.overrides, *settings))


SELF_DISTILLATION = Variant("Self-distillation")
"""The default recipe: the mix with the frozen reference, whose entropy is matched with k capped at 1 + w, reverse KL,
and a frozen teacher."""
STUDENT_MIX = Variant("Mix with the student", ("target.anchor=student",))
"""The default recipe with the student that is being trained in the place of the reference."""
STUDENT_MIX_STRICT = Variant("Mix with the student, strict match", ("target=strict", "target.anchor=student"))
STUDENT_MIX_FORWARD_KL = Variant(
    "Mix with the student, forward KL", ("target.anchor=student", "loss.divergence=forward_kl")
)
TEACHER_ALONE = Variant("Teacher alone", ("recipe=teacher_alone",))
FORWARD_KL = Variant("Forward KL", ("loss.divergence=forward_kl",))
"""The default recipe under forward KL."""
SURER_FORWARD_KL = Variant("Forward KL, w = 2", ("loss.divergence=forward_kl", "target.teacher_weight=2"))
TEACHER_ALONE_FORWARD_KL = Variant("Teacher alone, forward KL", ("recipe=teacher_alone", "loss.divergence=forward_kl"))
LITERAL = Variant("Literal recipe", ("recipe=literal",))
REJECTION = Variant("RFT with a verifier", ("method.name=rft",))
"""Rejection fine-tuning: next-token training on the model's own responses that the verifier accepts."""


@dataclass(frozen=True)
class Outcome:
    """The run of a variant and its measurement."""

    variant: Variant
    run_dir: Path
    status: int
    """The exit status: 0, or 3 if a guard stopped the run."""
    seconds: float
    """Wall time of the run with its evaluations and without the measurement."""
    cpu_seconds: float
    """Processor time of the same, which other programs on the machine hardly change."""
    measurement: Measurement

    @property
    def stopped(self) -> bool:
        """Whether a guard stopped the run."""
        return self.status == EXIT_UNHEALTHY


def run_variant(variant: Variant, base: Base, directory: Path, *, num_samples: int = 8) -> Outcome:
    """Train from ``base`` in a new ``directory/<title>`` and measure the trained model."""
    run_dir, status, seconds, cpu_seconds = train_variant(variant, base, directory)
    measured = measure(base, run_dir, num_samples=num_samples)
    return Outcome(variant, run_dir, status, seconds, cpu_seconds, measured)


def train_variant(variant: Variant, base: Base, directory: Path) -> tuple[Path, int, float, float]:
    """Train from ``base`` in a new ``directory/<title>``; return it, the status, wall and processor seconds."""
    run_dir = directory / "".join(c if c.isalnum() or c == "-" else "_" for c in variant.title.lower())
    shutil.rmtree(run_dir, ignore_errors=True)
    overrides = (*base.overrides, *variant.overrides)
    console.rule(f"[bold]{variant.title}", align="left")
    by_hand = command((*overrides, f"run_dir={run_dir}-by-hand"))
    console.print(by_hand, style="dim", markup=False, soft_wrap=True)
    began, cpu_began = time.perf_counter(), time.process_time()
    settings = [*overrides, f"run_dir={run_dir}"]
    given = configuration.GivenKeys(settings, CONFIG_NAME)  # events.jsonl and the report name the command
    status = train(configuration.load(settings, CONFIG_NAME), given)
    return run_dir, status, time.perf_counter() - began, time.process_time() - cpu_began
