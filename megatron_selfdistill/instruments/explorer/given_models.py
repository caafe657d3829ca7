# Copyright (c) 2026 the megatron_selfdistill authors. Apache-2.0.
"""Student, teacher and reference of a command that reads responses with all of them.  Nothing here imports torch."""

from __future__ import annotations

import argparse
import dataclasses
from collections.abc import Mapping, Set
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import yaml

from megatron_selfdistill.annexes import door
from megatron_selfdistill.checkpoint.formats import directory
from megatron_selfdistill.checkpoint.formats.weights_digest import KEPT_BASE
from megatron_selfdistill.commands import prechecks
from megatron_selfdistill.commands.model_command import given_config, overridden_keys
from megatron_selfdistill.config import Config
from megatron_selfdistill.config.world_checks import check_ranks
from megatron_selfdistill.distributed.roll_call import world_size
from megatron_selfdistill.errors import ConfigError

CONFIGURATION_FILE = "config.yaml"
SETTINGS = {
    "data": (
        "tokenizer chat_template chat_template_kwargs system_prompt views student_template teacher_template "
        "trust_remote_code on_long_context max_length"
    ).split(),
    "target": "rule teacher_weight k_max k anchor match control num_controls".split(),
    "loss": "divergence jsd_lambda".split(),
    "rollout": "max_new_tokens temperature top_k top_p stop_token_ids".split(),
}
"""The keys that `with_settings_of` takes from a run, by section."""


class ModelCheckpoints(NamedTuple):
    """The Megatron checkpoints of the models, as `AllModels.load` takes them."""

    student: str
    teacher: str | None
    reference: str | None


@dataclass(frozen=True)
class ModelPlaces:
    """The places of the models: Megatron checkpoints or Hugging Face directories."""

    student: Path
    iteration: int | None
    """The iteration of the student's Megatron checkpoint; None is the tracker file's."""
    teacher: Path | None
    """The teacher; None if the teacher has the student's weights."""
    reference: Path | None
    """The reference; None for a target without a reference, and where the reference has the student's weights."""

    @classmethod
    def of(cls, arguments: argparse.Namespace, config: Config) -> ModelPlaces:
        """Return the models of a command line (checkpoint, iteration, teacher).

        A run directory stands for its latest checkpoint; the weights that the run has started from are its reference
        and, if it is frozen, its teacher.  Raises: `ConfigError`.
        """
        path: Path = arguments.checkpoint
        if directory.download_advice(path):
            path = door("hugging_face").model_directory(path)
        teacher: Path | None = arguments.teacher
        if not is_run(path):
            return cls(path, arguments.iteration, teacher, teacher if config.is_anchored else None)
        initial = teacher or initial_weights(path)
        if _configuration(path).get("teacher", {}).get("weights") == "frozen":
            teacher = initial
        return cls(path, arguments.iteration, teacher, initial if config.is_anchored else None)

    def check(self) -> None:
        """Raise `ConfigError` or `CheckpointError` if a model is missing, without importing torch."""
        for path, iteration in ((self.student, self.iteration), (self.teacher, None), (self.reference, None)):
            if path is None:
                continue
            if directory.is_hugging_face(path):
                if iteration is not None:
                    raise ConfigError("--iteration chooses among Megatron checkpoints, got a Hugging Face directory")
                door("hugging_face").require_hugging_face(path)
            else:
                directory.require_checkpoint(path, iteration)

    def found_student(self) -> dict[str, Any]:
        """Return `find_model` of the student.  Raises: `CheckpointError`."""
        from megatron_selfdistill.commands.given_model import find_model

        hf, megatron = (self.student, None) if directory.is_hugging_face(self.student) else (None, self.student)
        return find_model(hf, megatron, self.iteration)

    def placed(self, student: dict[str, Any], converted_to: Path, stack: ExitStack) -> ModelCheckpoints:
        """Return the Megatron checkpoints of student, teacher and reference.

        ``student``: the result of `found_student`.  ``converted_to``: the directory that holds converted Hugging Face
        directories until ``stack`` ends.  Every rank of the world calls this method.  Raises: `CheckpointError`.
        """
        from megatron_selfdistill.interop.foreign_models import converted

        def place(model: Path, name: str) -> str:
            is_hf = directory.is_hugging_face(model)
            return str(stack.enter_context(converted(model, converted_to / name)) if is_hf else model)

        has_own_reference = self.reference is not None and self.reference != self.teacher
        return ModelCheckpoints(
            place(Path(student["path"]), "student"),
            None if self.teacher is None else place(self.teacher, "teacher"),
            place(self.reference, "reference") if self.reference and has_own_reference else None,
        )

    def about(self) -> str:
        """Return a line about the models for the user."""
        return f"student: {self.student}; teacher: {self.teacher or self.student}"


def add_models(parser: argparse.ArgumentParser) -> None:
    """Add the options that name the models, as `ModelPlaces.of` takes them."""
    parser.add_argument(
        "checkpoint",
        type=Path,
        metavar="CHECKPOINT",
        help="run directory, Megatron checkpoint (an iter_ directory, or the one with the tracker file), or Hugging "
        "Face directory",
    )
    parser.add_argument(
        "--iteration", type=int, metavar="N", help="iteration of a Megatron checkpoint (default: the tracker file's)"
    )
    parser.add_argument(
        "--teacher",
        type=Path,
        metavar="DIR",
        help="checkpoint of the teacher and of the reference (default: CHECKPOINT, as at the start of a run; of a run "
        "directory what the run has started from, except that a teacher that is not frozen has the student's weights)",
    )


def config_of_reading(
    arguments: argparse.Namespace, reserved: Mapping[str, str], evaluation: Mapping[str, Any]
) -> tuple[Config, frozenset[str]]:
    """Return `given_config`, with the settings of a run whose directory ``arguments.checkpoint`` is.

    Raises: `ConfigError` or `CheckpointError` also for models, an output file or ranks that cannot be used.
    """
    config, keys = given_config(arguments, reserved, evaluation)
    if is_run(arguments.checkpoint):
        config = with_settings_of(arguments.checkpoint, config, overridden_keys(arguments))
    if not config.has_teacher:
        raise ConfigError(
            f"expected a method with a target, such as method.name=default, got method.name={config.method.name}"
        )
    if arguments.out.is_dir():
        raise ConfigError(f"--out: expected a file, got the directory {arguments.out}")
    ModelPlaces.of(arguments, config).check()
    prechecks.require_data(config)
    check_ranks(config, world_size())
    return config, keys


def is_run(path: Path) -> bool:
    """Return whether a directory is that of a run: it has the run's configuration."""
    return (path / CONFIGURATION_FILE).is_file()


def with_settings_of(run_dir: Path, config: Config, overridden: Set[str]) -> Config:
    """Return ``config`` with the `SETTINGS` of a run, except the keys and the sections that ``overridden`` names.

    Raises: `ConfigError` for a file that cannot be read.
    """
    stored = _configuration(run_dir)
    if stored.get("teachers"):
        raise ConfigError(
            f"{run_dir / CONFIGURATION_FILE} has the key teachers, and this command reads one teacher: name a "
            "checkpoint of the run in place of its directory, and the teacher with --teacher"
        )
    for section, names in SETTINGS.items():
        if section in overridden:
            continue
        values = {
            name: value
            for name, value in stored.get(section, {}).items()
            if name in names and f"{section}.{name}" not in overridden
        }
        replaced = dataclasses.replace(getattr(config, section), **values)
        config = dataclasses.replace(config, **{section: replaced})
    return config


def initial_weights(run_dir: Path) -> Path | None:
    """Return the checkpoint of the weights that a run has started from; None if the run did not keep them."""
    load = _configuration(run_dir).get("checkpoint", {}).get("load")
    kept = run_dir / KEPT_BASE
    return Path(load) if load is not None else kept if kept.is_dir() else None


def _configuration(run_dir: Path) -> dict[str, Any]:
    path = run_dir / CONFIGURATION_FILE
    try:
        stored = yaml.safe_load(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError, yaml.YAMLError) as error:
        raise ConfigError(f"expected the configuration of a run in {path}, got {error}") from error
    if not isinstance(stored, dict):
        raise ConfigError(f"expected the configuration of a run in {path}, got {type(stored).__name__}")
    return stored
