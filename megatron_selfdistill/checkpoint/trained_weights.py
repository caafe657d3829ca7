# Copyright (c) 2026 the megatron_selfdistill authors. Apache-2.0.
"""Which weights of the model a run trains, and the weights of a model that only computes.

`TrainedWeights` is the seam: learner and `Checkpointer` ask it what they load, train and store.  The key
``adapter.rank`` puts a class that derives from it in its place.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch

from megatron_selfdistill.annexes import door
from megatron_selfdistill.checkpoint import state
from megatron_selfdistill.checkpoint.external import load_weights
from megatron_selfdistill.checkpoint.formats import directory
from megatron_selfdistill.checkpoint.formats.saved_run import SavedRun
from megatron_selfdistill.config import Config
from megatron_selfdistill.config.schema.whole_config import trains_all_weights
from megatron_selfdistill.distributed.collectives import run_on_rank_0
from megatron_selfdistill.distributed.ranks import RankGrid
from megatron_selfdistill.model.build import new_chunks

Chunks = Sequence[torch.nn.Module]


class TrainedWeights:
    """The weights of the model that a run trains and that its checkpoints hold; here the default: all of them."""

    def load_start(self, config: Config, chunks: Chunks, grid: RankGrid, vocab_size: int, *, is_new: bool) -> None:
        """Give new chunks, which DDP does not wrap yet, the weights at which a run begins.

        ``is_new``: whether no checkpoint of the run follows.  Every rank of the world calls it.
        Raises: `ConfigError`, `CheckpointError`.
        """
        load = config.checkpoint.load
        if load is not None and is_new and not config.checkpoint.load_optimizer:
            load_weights(Path(load), chunks, vocab_size, config.checkpoint.verify)

    def start_of(self, chunks: Chunks) -> list[torch.nn.Module] | None:
        """Return chunks that compute with the weights at the start of the run; None if only a copy keeps these."""
        return None

    @staticmethod
    def stored(model: dict[str, Any]) -> dict[str, Any]:
        """Return the part of a `state.model_state` that a checkpoint of the run holds."""
        return model

    @staticmethod
    def load(chunks: Chunks, loaded: dict[str, Any]) -> None:
        """Copy ``loaded``, the tensors of `stored` from a checkpoint, into the chunks."""
        state.load_model_state(chunks, loaded)

    def texts(
        self, save_frozen: Callable[..., str], path: Path, chunks: Chunks, common: dict[str, Any]
    ) -> dict[str, str]:
        """Return further files of the checkpoint ``path`` by name, after what they name has been saved.

        ``save_frozen``: `Checkpointer.save_frozen`.  ``common``: the entries of common.pt that every checkpoint has.
        Every rank of the world calls it.
        """
        return {}


def trained_weights(config: Config, saved: SavedRun | None) -> TrainedWeights:
    """Return what a run trains; ``saved``: the checkpoint from which it continues, None for a new run.

    Every rank of the world calls it.  Raises: `ConfigError`, `CheckpointError`.
    """
    load = config.checkpoint.load
    if load is not None and run_on_rank_0(lambda: holds_adapters(Path(load))):
        run_on_rank_0(lambda: door("adapters").refuse_adapters(Path(load)))
    if config.adapter.rank or config.adapter.load is not None:
        adapted: TrainedWeights = door("adapters").TrainedAdapters.of(config, saved)
        return adapted
    return TrainedWeights()


def as_stored(config: Config) -> Config:
    """Return ``config`` with the settings of the adapters in ``checkpoint.load``, and rank 0 where it has none.

    Every rank of the world calls it.  Raises: `ConfigError`, `CheckpointError`.
    """
    load = config.checkpoint.load
    if trains_all_weights(config) and (load is None or not run_on_rank_0(lambda: holds_adapters(Path(load)))):
        return config
    changed: Config = door("adapters").with_stored_adapters(config)
    return changed


def loaded_chunks(config: Config, grid: RankGrid, vocab_size: int, checkpoint: str | None) -> list[torch.nn.Module]:
    """Return this rank's chunks of the configured model with the weights of ``checkpoint``; null keeps initial weights.

    Where ``checkpoint`` holds adapters alone, the chunks have these adapters on the weights of their base, which is at
    ``adapter.base``, or else where the checkpoint says.
    Every rank of the world calls it.  Raises: `ConfigError`, `CheckpointError`.
    """
    chunks = new_chunks(config, grid, vocab_size)
    if checkpoint is None:
        return chunks
    path = Path(checkpoint)
    if config.adapter.load is not None or run_on_rank_0(lambda: holds_adapters(path)):
        door("adapters").load_adapted(config, path, chunks, grid, vocab_size)
    else:
        load_weights(path, chunks, vocab_size, config.checkpoint.verify)
    return chunks


def full_weights(config: Config, path: Path) -> Path:
    """Return the checkpoint with all weights of the model at ``path``: that of the base, where it holds adapters."""
    return Path(door("adapters").full_weights_of(path, config.adapter.base)) if holds_adapters(path) else path


def holds_adapters(path: Path) -> bool:
    """Return whether the checkpoint at ``path``, or the one that its tracker file names, holds adapters alone."""
    return ((directory.tracked(path) or path) / "adapters.json").is_file()
