# Copyright (c) 2026 the megatron_selfdistill authors. Apache-2.0.
"""The model that a command line names: a Megatron checkpoint or a Hugging Face directory."""

from __future__ import annotations

import dataclasses
import hashlib
import os
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from megatron_selfdistill.annexes import door
from megatron_selfdistill.checkpoint.formats import directory
from megatron_selfdistill.checkpoint.formats.directory import hf_assets_of
from megatron_selfdistill.checkpoint.formats.stored_model import fields_set, reconcile, with_stored_architecture
from megatron_selfdistill.checkpoint.trained_weights import full_weights
from megatron_selfdistill.checkpoint.vocabulary import require_same_tokenizer
from megatron_selfdistill.choices import PRECISIONS
from megatron_selfdistill.config import Config
from megatron_selfdistill.distributed.collectives import run_on_rank_0
from megatron_selfdistill.distributed.ranks import RankGrid
from megatron_selfdistill.errors import ConfigError

_NAMES = {"bf16": "bfloat16", "fp32": "float32"}
"""A value of optimizer.precision -> torch's name of the type."""


def converted_beside(run_dir: Path, name: Path) -> Path:
    """Return the checkpoint with the weights of a Hugging Face directory, or of a model on the hub.

    It lies beside the directory of the run, with a digest of the model's place, since two models may have one name.
    Where it is missing, the process converts it, unless it is a rank.
    Raises: `ConfigError`, `CheckpointError`.
    """
    place = str(name.resolve() if name.exists() else name)
    checkpoint = run_dir.parent / f"{name.name}-{hashlib.sha256(place.encode()).hexdigest()[:8]}-megatron"
    if directory.tracked(checkpoint) is None:
        if "RANK" in os.environ:
            raise ConfigError(f"model={name} is not converted yet: start `selfdistill train --ranks N` in its place")
        door("interop").convert_found(name, checkpoint)
    return checkpoint


def export(run_dir: Path) -> Path:
    """Write the last checkpoint as the run's Hugging Face directory ``hf``, unless it is there; return its path."""
    exported: Path = door("interop").export_once(run_dir / "checkpoints", run_dir / "hf")
    return exported


def find_model(hf: Path | None, megatron: Path | None, iteration: int | None) -> dict[str, Any]:
    """Return format (hugging_face or megatron), path and iteration of a model, after a look at its files.

    One of ``hf`` and ``megatron`` is given.  Raises: `CheckpointError`.
    """
    if hf is not None:
        return {"format": "hugging_face", "path": str(hf), "iteration": None}
    assert megatron is not None
    found, _ = directory.find(directory.of_iteration(megatron, iteration))
    return {"format": "megatron", "path": str(found), "iteration": directory.iteration_of(found)}


def configured(config: Config, given: frozenset[str], model: dict[str, Any]) -> Config:
    """Return ``config`` with the tokenizer and the architecture of a ``model`` of `find_model`.

    ``given``: the keys that the user has set, which must not contradict the model.
    Raises: `ConfigError`, `CheckpointError`.
    """
    path = Path(model["path"])
    tokenizer = config.data.tokenizer
    if tokenizer is None:
        assets = path if model["format"] == "hugging_face" else hf_assets_of(path)
        files = ("tokenizer.json", "tokenizer.model", "tokenizer_config.json")
        if assets is None or not any((assets / name).is_file() for name in files):
            raise ConfigError(f"expected a tokenizer in {path}, got none: set data.tokenizer=DIR")
        tokenizer = str(assets)
    config = dataclasses.replace(config, data=dataclasses.replace(config.data, tokenizer=tokenizer))
    if model["format"] == "hugging_face":
        stored = door("interop").hf_model(path)
        return dataclasses.replace(config, model=reconcile(config.model, fields_set(config.model, given), stored))
    checkpoint = dataclasses.replace(config.checkpoint, load=model["path"], resume=False)
    config = with_stored_architecture(dataclasses.replace(config, checkpoint=checkpoint), given)
    require_same_tokenizer(config)
    return config


def computed_in(config: Config, model: dict[str, Any]) -> str:
    """Return a line about the type in which a command computes, and about the type of most weights of ``model``.

    ``model``: a result of `find_model`; the base counts for adapters.  Raises: `CheckpointError`.
    """
    path = Path(model["path"])
    computed = _NAMES[config.optimizer.precision]
    stored = str(door("interop").main_dtype(full_weights(config, path))).removeprefix("torch.")
    if stored == computed:
        return f"computed in {computed}, the type of the weights"
    other = next(name for name in PRECISIONS if name != config.optimizer.precision)
    return (
        f"computed in {computed} (optimizer.precision={config.optimizer.precision}), and the weights are {stored}: "
        f"optimizer.precision={other} computes in {_NAMES[other]}"
    )


@contextmanager
def temporary_directory(parent: Path, grid: RankGrid) -> Iterator[Path]:
    """Make a temporary directory in ``parent`` that all ranks see, and remove it at the end."""

    def make() -> str:
        parent.mkdir(parents=True, exist_ok=True)
        return tempfile.mkdtemp(dir=parent, prefix=".selfdistill-")

    directory = Path(run_on_rank_0(make))
    try:
        yield directory
    finally:
        if grid.is_reporter:
            shutil.rmtree(directory, ignore_errors=True)
