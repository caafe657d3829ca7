# Copyright (c) 2026 the megatron_selfdistill authors. Apache-2.0.
"""The model that a command line names: a Megatron checkpoint or a Hugging Face directory."""

from __future__ import annotations

import dataclasses
import math
import shutil
import tempfile
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch

from megatron_selfdistill.annexes import door
from megatron_selfdistill.checkpoint.formats.directory import hf_assets_of, holds_adapters
from megatron_selfdistill.checkpoint.formats.full_weights import open_weights
from megatron_selfdistill.checkpoint.formats.hf_files import read_config
from megatron_selfdistill.checkpoint.formats.safetensors_directory import open_weights_directory
from megatron_selfdistill.checkpoint.formats.stored_model import reconcile, with_stored_architecture
from megatron_selfdistill.checkpoint.vocabulary import require_same_tokenizer
from megatron_selfdistill.choices import PRECISIONS
from megatron_selfdistill.config import Config
from megatron_selfdistill.distributed.collectives import run_on_rank_0
from megatron_selfdistill.distributed.ranks import RankGrid
from megatron_selfdistill.errors import ConfigError
from megatron_selfdistill.interop.conversion import DTYPES
from megatron_selfdistill.interop.hf.mapping import family_of


def find_model(hf: Path | None, megatron: Path | None, iteration: int | None) -> dict[str, Any]:
    """Return format (hugging_face or megatron), path and iteration of a model, after a look at its files.

    One of ``hf`` and ``megatron`` is given.  Raises: `CheckpointError`.
    """
    if hf is not None:
        return {"format": "hugging_face", "path": str(hf), "iteration": None}
    assert megatron is not None
    weights = open_weights(megatron, iteration)
    return {"format": "megatron", "path": str(weights.path), "iteration": weights.iteration}


def configured(config: Config, given: frozenset[str], model: dict[str, Any]) -> Config:
    """Return ``config`` with the tokenizer and the architecture of a ``model`` of `find_model`.

    ``given``: the keys that the user has set, which must not contradict the model.
    Raises: `ConfigError`, `CheckpointError`.
    """
    path = Path(model["path"])
    tokenizer = config.data.tokenizer or _tokenizer_of(path, model["format"])
    config = dataclasses.replace(config, data=dataclasses.replace(config.data, tokenizer=tokenizer))
    if model["format"] == "hugging_face":
        return _with_hf_architecture(config, given, path)
    checkpoint = dataclasses.replace(config.checkpoint, load=model["path"], resume=False)
    config = with_stored_architecture(dataclasses.replace(config, checkpoint=checkpoint), given)
    require_same_tokenizer(config)
    return config


def computed_in(config: Config, model: dict[str, Any]) -> str:
    """Return a line about the type in which a command computes, and about the type of most weights of ``model``.

    ``model``: a result of `find_model`; the base counts for adapters.  Raises: `CheckpointError`.
    """
    computed = str(DTYPES[config.optimizer.precision]).removeprefix("torch.")
    stored = str(_main_dtype(config, model)).removeprefix("torch.")
    if stored == computed:
        return f"computed in {computed}, the type of the weights"
    other = next(name for name in PRECISIONS if name != config.optimizer.precision)
    return (
        f"computed in {computed} (optimizer.precision={config.optimizer.precision}), and the weights are {stored}: "
        f"optimizer.precision={other} computes in {str(DTYPES[other]).removeprefix('torch.')}"
    )


def _main_dtype(config: Config, model: dict[str, Any]) -> torch.dtype:
    path = Path(model["path"])
    if model["format"] == "hugging_face":
        sizes: Counter[torch.dtype] = Counter()
        for tensor in open_weights_directory(path).tensors.values():
            sizes[tensor.dtype] += math.prod(tensor.shape)
        return max(sizes, key=lambda dtype: sizes[dtype])
    if holds_adapters(path):
        path = door("adapters").full_weights_of(path, config.adapter.base)
    held = open_weights(path).sizes()
    return max(held, key=lambda dtype: held[dtype])


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


def _with_hf_architecture(config: Config, given: frozenset[str], hf: Path) -> Config:
    """Return ``config`` with the architecture that the checkpoint converted from ``hf`` will have."""
    description = read_config(hf)
    fields = {key.removeprefix("model.") for key in given if key.startswith("model.")}
    stored = family_of(description).model_config(description)
    return dataclasses.replace(config, model=reconcile(config.model, fields, stored))


def _tokenizer_of(path: Path, model_format: str) -> str:
    """Return the directory of the tokenizer in a Hugging Face directory, or among the HF assets of a checkpoint."""
    directory = path if model_format == "hugging_face" else hf_assets_of(path)
    files = ("tokenizer.json", "tokenizer.model", "tokenizer_config.json")
    if directory is None or not any((directory / name).is_file() for name in files):
        raise ConfigError(f"expected a tokenizer in {path}, got none: set data.tokenizer=DIR")
    return str(directory)
