# Copyright (c) 2026 the megatron_selfdistill authors. Apache-2.0.
"""Student, teacher and reference of a command that reads responses with all of them.  Nothing here imports torch."""

from __future__ import annotations

import argparse
from collections.abc import Mapping
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

from megatron_selfdistill import prechecks
from megatron_selfdistill.commands.given_config import given_config
from megatron_selfdistill.commands.run_settings import has_frozen_teacher, initial_weights, is_run, with_settings_of
from megatron_selfdistill.config import Config
from megatron_selfdistill.config.world_checks import check_ranks
from megatron_selfdistill.distributed.roll_call import world_size
from megatron_selfdistill.errors import ConfigError


class PlacedModels(NamedTuple):
    """The Megatron checkpoints of the models, as `AllModels.load` takes them."""

    student: str
    teacher: str | None
    reference: str | None


@dataclass(frozen=True)
class GivenModels:
    """The places of the models: Megatron checkpoints or Hugging Face directories."""

    student: Path
    iteration: int | None
    """The iteration of the student's Megatron checkpoint; None is the tracker file's."""
    teacher: Path | None
    """The teacher; None where the teacher has the student's weights."""
    reference: Path | None
    """The reference; None for a target without a reference, and where the reference has the student's weights."""

    @classmethod
    def of(cls, arguments: argparse.Namespace, config: Config) -> GivenModels:
        """Return the models of a command line (checkpoint, iteration, teacher).

        A run directory stands for its latest checkpoint; the weights that the run has started from are its reference
        and, if it is frozen, its teacher.  Raises: `ConfigError`.
        """
        path: Path = arguments.checkpoint
        teacher: Path | None = arguments.teacher
        if not is_run(path):
            return cls(path, arguments.iteration, teacher, teacher if config.is_anchored else None)
        initial = teacher or initial_weights(path)
        if has_frozen_teacher(path):
            teacher = initial
        return cls(path, arguments.iteration, teacher, initial if config.is_anchored else None)

    def check(self, config: Config) -> None:
        """Raise `ConfigError` or `CheckpointError` if a model is missing, without importing torch."""
        for path, iteration in ((self.student, self.iteration), (self.teacher, None), (self.reference, None)):
            if path is None:
                continue
            if _is_hugging_face(path):
                if iteration is not None:
                    raise ConfigError("--iteration chooses among Megatron checkpoints, got a Hugging Face directory")
                prechecks.require_hugging_face(path)
            else:
                prechecks.require_model(config, path, iteration)

    def found_student(self) -> dict[str, Any]:
        """Return `find_model` of the student.  Raises: `CheckpointError`."""
        from megatron_selfdistill.commands.given_model import find_model

        hf, megatron = (self.student, None) if _is_hugging_face(self.student) else (None, self.student)
        return find_model(hf, megatron, self.iteration)

    def placed(self, student: dict[str, Any], directory: Path, stack: ExitStack) -> PlacedModels:
        """Return the Megatron checkpoints of student, teacher and reference.

        ``student``: the result of `found_student`.  ``directory``: holds the converted Hugging Face directories until
        ``stack`` ends.  Every rank of the world calls this method.  Raises: `CheckpointError`.
        """
        from megatron_selfdistill.evaluation.inference import converted

        def place(model: Path, name: str) -> str:
            return str(stack.enter_context(converted(model, directory / name)) if _is_hugging_face(model) else model)

        has_own_reference = self.reference is not None and self.reference != self.teacher
        return PlacedModels(
            place(Path(student["path"]), "student"),
            None if self.teacher is None else place(self.teacher, "teacher"),
            place(self.reference, "reference") if self.reference and has_own_reference else None,
        )

    def about(self) -> str:
        """Return a line about the models for the user."""
        return f"student: {self.student}; teacher: {self.teacher or self.student}"


def config_before_the_model(
    arguments: argparse.Namespace, reserved: Mapping[str, str], evaluation: Mapping[str, Any]
) -> tuple[Config, frozenset[str]]:
    """Return the configuration of the command line before the model is known, and the keys that the user has set.

    A run directory gives the settings of its run.  Arguments and errors: as for `given_config`.
    """
    given = given_config(arguments, reserved, evaluation)
    if is_run(arguments.checkpoint):
        return with_settings_of(arguments.checkpoint, given.config, given.overridden), given.keys
    return given.config, given.keys


def check_reading(arguments: argparse.Namespace, config: Config) -> None:
    """Raise `ConfigError` or `CheckpointError` for models, an output file or ranks that cannot be used."""
    if config.objective != "self_distillation":
        raise ConfigError(f"expected objective=self_distillation, which has a target, got {config.objective}")
    if arguments.out.is_dir():
        raise ConfigError(f"--out: expected a file, got the directory {arguments.out}")
    GivenModels.of(arguments, config).check(config)
    prechecks.require_data(config)
    check_ranks(config, world_size())


def _is_hugging_face(path: Path) -> bool:
    return (path / "config.json").is_file()
