# Copyright (c) 2026 the megatron_selfdistill authors. Apache-2.0.
"""Checks of the files and directories that a configuration names, on every rank and before torch is imported."""

from __future__ import annotations

import os
from pathlib import Path

from megatron_selfdistill.config.schema.whole_config import Config
from megatron_selfdistill.errors import ConfigError


def check_files(config: Config) -> None:
    """Raise `ConfigError` if the data, tokenizer or recorded responses are missing, or ``run_dir`` cannot be written.

    Nothing is created.
    """
    for key, value in (("data.path", config.data.path), ("data.tokenizer", config.data.tokenizer)):
        if value is None:
            raise ConfigError(f"{key} is not set: give a file of problems and a tokenizer, or see `make quickstart`")
    _check_run_dir(config.run_dir)
    replay = config.rollout.replay
    if replay is not None and not os.path.isfile(replay):
        raise ConfigError(
            f"rollout.replay={replay}: there is no such file; give a file that rollout.record has written"
        )


def _check_run_dir(run_dir: str | None) -> None:
    if not run_dir:
        raise ConfigError(
            "run_dir is not set: name a directory for the checkpoints and metrics of this run, such as "
            "run_dir=runs/first; an existing run is continued"
        )
    path = Path(run_dir).absolute()
    try:
        nearest = next(place for place in (path, *path.parents) if _exists(place))
        longest = os.pathconf(nearest if nearest.is_dir() else nearest.parent, "PC_NAME_MAX")
    except OSError as error:
        raise ConfigError(f"run_dir={run_dir}: {error.strerror}; choose another directory") from error
    for part in path.relative_to(nearest).parts:
        if len(os.fsencode(part)) > longest:
            raise ConfigError(f"run_dir={run_dir}: the name {part[:20]}... has more than {longest} bytes; shorten it")
    if not nearest.is_dir():
        raise ConfigError(f"run_dir={run_dir}: expected a directory, but {nearest} is a file; choose another name")
    if not os.access(nearest, os.W_OK | os.X_OK):
        raise ConfigError(f"run_dir={run_dir}: {nearest} may not be written by this user; choose another directory")


def _exists(path: Path) -> bool:
    try:
        os.stat(path)
    except (FileNotFoundError, NotADirectoryError):
        return False
    return True
