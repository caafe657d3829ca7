# Copyright (c) 2026 the megatron_selfdistill authors. Apache-2.0.
"""The checks that commands make before they import torch: missing inputs, and layouts that do not fit the ranks.

The code that reads the inputs later has the same messages.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from megatron_selfdistill.checkpoint.formats import directory
from megatron_selfdistill.commands.installation import RUN, about_missing
from megatron_selfdistill.config import Config
from megatron_selfdistill.config.world_checks import check_ranks, check_world
from megatron_selfdistill.data.records import data_files, is_hub_name
from megatron_selfdistill.data.tokenizer_files import tokenizer_place
from megatron_selfdistill.errors import ConfigError


def require_data(config: Config) -> None:
    """Raise `ConfigError` if the problems or the tokenizer of ``config`` do not exist; a name of the hub passes."""
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
    """Raise `CheckpointError` if there is no checkpoint at ``checkpoint.load``, unless the run resumes."""
    if config.checkpoint.load is not None and not _resumes(config):
        directory.require_checkpoint(Path(config.checkpoint.load))


def require_ranks(config: Config, world_size: int) -> None:
    """Raise `ConfigError` if the layout of ``config`` does not fit ``world_size`` ranks.

    The check includes the sizes of the model only if no checkpoint states these sizes.
    """
    check_ranks(config, world_size)
    if config.checkpoint.load is None and not _resumes(config):
        check_world(config, world_size)


def _resumes(config: Config) -> bool:
    run_dir = config.run_dir if config.checkpoint.resume else None
    return run_dir is not None and bool(directory.candidates(Path(run_dir) / "checkpoints"))


def require_answers_per_problem(num_samples: int, ks: Sequence[int], majority_ks: Sequence[int] = ()) -> None:
    """Raise `ConfigError` if a k of pass@k or majority@k is less than 1 or more than ``num_samples``."""
    for name, those in (("pass@k", ks), ("majority@k", majority_ks)):
        if num_samples and (max(those, default=1) > num_samples or min(those, default=1) < 1):
            raise ConfigError(f"expected every k of {name} from 1 to the {num_samples} samples, got {list(those)}.")


def require_packages(config: Config) -> None:
    """Raise `ConfigError` if this Python lacks a package of every run, or that of an engine here, with its name."""
    missing, engine = about_missing("a run", RUN), config.rollout.engine
    if missing is None and config.rollout.is_colocated and config.samples:
        missing = about_missing(f"rollout.engine={engine}", {engine: engine}, engine)
    if missing is not None:
        raise ConfigError(missing)
