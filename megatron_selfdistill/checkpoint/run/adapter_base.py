# Copyright (c) 2026 the megatron_selfdistill authors. Apache-2.0.
"""The frozen weights below the adapters of a run: where they are, and the proof that they are the right ones."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from megatron_selfdistill.checkpoint import directory
from megatron_selfdistill.checkpoint.run import state
from megatron_selfdistill.checkpoint.run.saved_run import SavedRun
from megatron_selfdistill.checkpoint.stored_adapters import (
    KEPT_BASE,
    NAME,
    StoredAdapters,
    checksums,
    digest_of,
    known_digest,
    read_stored_adapters,
    weight_files,
)
from megatron_selfdistill.config import AdapterConfig, Config
from megatron_selfdistill.distributed.collectives import gather_objects, run_on_each_rank, run_on_rank_0
from megatron_selfdistill.errors import CheckpointError


@dataclass(frozen=True)
class AdapterBase:
    """The adapters of a run, and the frozen weights below them."""

    settings: AdapterConfig
    load: Path | None
    """The checkpoint of the weights; None for the random weights of a new run."""
    digest: str | None
    """The `base_digest` of the weights; None for random weights, which get one when they are first saved."""
    is_kept: bool
    """Whether the run directory keeps the weights, because the run began at random ones."""
    is_told: bool = True
    """Whether a checkpoint names ``load``, which it does not where the value was read from the environment."""

    def described(self, path: Path, digest: str) -> StoredAdapters:
        """Return the description of the adapters in the checkpoint ``path``; ``digest``: that of the weights."""
        place = self.load.absolute() if self.load is not None and not self.is_kept and self.is_told else None
        return StoredAdapters(path, self.settings, digest, place)


class KeptBase:
    """The weights of a live model without its adapters, as `save_frozen_weights` takes them."""

    def __init__(self, chunks: Sequence[torch.nn.Module]) -> None:
        self.chunks = chunks

    def sharded_state_dict(self) -> dict[str, Any]:
        """Return the tensors of the weights under Megatron's keys, shared and not copied."""
        return state.without_adapters(state.model_state(self.chunks, state.CONTENT))


def adapter_base(config: Config, saved: SavedRun | None) -> AdapterBase | None:
    """Return the base of the run's adapters; None for a run without adapters.

    ``saved``: the checkpoint from which the run continues; None for a new run.
    Collective: the ranks share the reading of files whose checksums are not known.
    Raises: CheckpointError on all ranks where the base is missing, or is not the one of ``saved``.
    """
    if config.adapter.rank == 0:
        return None
    load = None if config.checkpoint.load is None else Path(config.checkpoint.load)
    is_kept, is_told = load is None, ("checkpoint", "load") not in config.from_environment
    if saved is None:
        digest = None if load is None else shared_base_digest(load)
        return AdapterBase(config.adapter, load, digest, is_kept, is_told)
    stored = run_on_rank_0(lambda: read_stored_adapters(saved.path))
    if stored is None:
        raise CheckpointError(f"{saved.path} has no {NAME}, expected the description of its adapters")
    if load is None:
        load = Path(config.run_dir) / KEPT_BASE
        if not run_on_rank_0(load.is_dir):
            raise CheckpointError(
                f"{load} is missing, expected the base of the adapters in {saved.path}, with the digest "
                f"{stored.base_digest}: restore it, or set checkpoint.load to its present place"
            )
    digest = shared_base_digest(load)
    stored.require_base(digest, load, "checkpoint.load")
    return AdapterBase(config.adapter, load, digest, is_kept, is_told)


def shared_base_digest(path: Path) -> str:
    """Return `base_digest` of the checkpoint at ``path`` on all ranks, which share the reading.  Collective."""
    found, _ = run_on_rank_0(lambda: directory.find(path))
    known: str | None = run_on_rank_0(lambda: known_digest(found))
    if known is not None:
        return known

    def own_share() -> dict[str, Any]:
        files = sorted(weight_files(found), key=lambda file: (-file.stat().st_size, str(file)))
        return checksums(found, files[dist.get_rank() :: dist.get_world_size()])

    shares = gather_objects(run_on_each_rank(own_share))
    return digest_of({name: entry for share in shares for name, entry in share.items()})
