# Copyright (c) 2026 the megatron_selfdistill authors. Apache-2.0.
"""What every command can refuse before it imports torch: inputs that are not there, and layouts that cannot be cut.

The sentences are those of the code that reads the inputs later; this file only asks earlier.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from megatron_selfdistill.checkpoint import directory
from megatron_selfdistill.checkpoint.formats.hf_files import read_config, weight_files
from megatron_selfdistill.config import Config
from megatron_selfdistill.data.data_files import data_files, is_hub_name
from megatron_selfdistill.data.prompts import tokenizer_place
from megatron_selfdistill.errors import CheckpointError, ConfigError
from megatron_selfdistill.run_data import longest_context


def require_data(config: Config) -> None:
    """Raise `ConfigError` where the problems or the tokenizer that ``config`` names cannot be there.  Names of the
    Hugging Face hub pass."""
    data = config.data
    try:
        for path in (data.path, config.evaluation.path):
            if path is not None and not is_hub_name(path):
                data_files([path])
        if data.tokenizer is not None:
            tokenizer_place(data.tokenizer)
    except (ValueError, OSError) as error:
        raise ConfigError(str(error)) from error


def require_start(config: Config) -> None:
    """Raise `CheckpointError` where ``checkpoint.load`` is no checkpoint, unless the run resumes its own one."""
    if config.checkpoint.load is not None and not _resumes(config):
        require_checkpoint(Path(config.checkpoint.load))


def require_ranks(config: Config, world_size: int) -> None:
    """Raise `ConfigError` where ``world_size`` ranks cannot be cut as ``config`` says.

    The model's sizes are judged only where no checkpoint decides them.
    """
    config.check_ranks(world_size)
    if names_its_model(config):
        config.check_world(world_size)


def require_lengths(config: Config) -> None:
    """Raise `ConfigError` where contexts of ``data.max_length`` fit no row, or not the model, where no checkpoint
    decides what the model is."""
    if names_its_model(config):
        longest_context(config)


def names_its_model(config: Config) -> bool:
    """Return whether no checkpoint decides the architecture."""
    return config.checkpoint.load is None and not _resumes(config)


def _resumes(config: Config) -> bool:
    """Return whether ``run_dir`` holds checkpoints from which the run would continue."""
    run_dir = config.run_dir if config.checkpoint.resume else None
    return run_dir is not None and bool(directory.candidates(Path(run_dir) / "checkpoints"))


def require_answers_per_problem(num_samples: int, ks: Sequence[int], majority_ks: Sequence[int] = ()) -> None:
    """Raise `ConfigError` where a k of pass@k or majority@k asks for more samples than there are."""
    for name, those in (("pass@k", ks), ("majority@k", majority_ks)):
        if num_samples and (max(those, default=1) > num_samples or min(those, default=1) < 1):
            raise ConfigError(
                f"Evaluation: expected every k of {name} from 1 to the {num_samples} samples, got {list(those)}."
            )


def require_checkpoint(path: Path, iteration: int | None = None) -> None:
    """Raise `CheckpointError` where there is no Megatron checkpoint at ``path``, or none of ``iteration``."""
    chosen = directory.of_iteration(Path(path), iteration)
    directory.refuse_hugging_face(chosen)
    holder = directory.tracked(chosen) or chosen
    if not directory.is_legacy(holder) and directory.lacks(holder):
        directory.resolve(chosen)


def require_hugging_face(path: Path) -> None:
    """Raise `CheckpointError` where ``path`` is no folder with a config.json and files of weights."""
    read_config(path)
    weight_files(Path(path))


def is_hugging_face(path: Path) -> bool:
    """Return whether ``path`` is a Hugging Face folder and no Megatron checkpoint."""
    try:
        directory.refuse_hugging_face(Path(path))
    except CheckpointError:
        return True
    return False
