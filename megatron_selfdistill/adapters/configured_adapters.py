# Copyright (c) 2026 the megatron_selfdistill authors. Apache-2.0.
"""The adapters of a run and of a model that only computes, and the frozen weights below them."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch

from megatron_selfdistill.adapters import ADAPTER_SUFFIX
from megatron_selfdistill.adapters.low_rank_adapters import WithoutAdapters, add_adapters
from megatron_selfdistill.adapters.stored_adapters import (
    NAME,
    SETTINGS,
    StoredAdapters,
    read_stored_adapters,
    require_adapters,
)
from megatron_selfdistill.adapters.stored_adapters import refuse_adapters as refuse_adapters
from megatron_selfdistill.checkpoint import state
from megatron_selfdistill.checkpoint.external import load_weights
from megatron_selfdistill.checkpoint.formats import directory
from megatron_selfdistill.checkpoint.formats.model_tensors import weight_shapes
from megatron_selfdistill.checkpoint.formats.saved_run import SavedRun
from megatron_selfdistill.checkpoint.formats.torch_dist import CONTENT, stored_shapes
from megatron_selfdistill.checkpoint.formats.weights_digest import KEPT_BASE, KEPT_DIGEST
from megatron_selfdistill.checkpoint.frozen_weights import shared_base_digest
from megatron_selfdistill.checkpoint.trained_weights import TrainedWeights
from megatron_selfdistill.config import Config
from megatron_selfdistill.config.schema.adapter_config import AdapterConfig, require_engine
from megatron_selfdistill.distributed.collectives import run_on_rank_0
from megatron_selfdistill.distributed.ranks import RankGrid
from megatron_selfdistill.errors import CheckpointError, ConfigError
from megatron_selfdistill.model.forward import unwrapped

Chunks = Sequence[torch.nn.Module]


@dataclass(frozen=True)
class TrainedAdapters(TrainedWeights):
    """The adapters of a run, and the frozen weights below them."""

    settings: AdapterConfig
    base: Path | None
    """The checkpoint of the weights; None for the random weights of a new run."""
    digest: str | None
    """The `base_digest` of the weights; None for random weights, which get one when they are first saved."""
    is_kept: bool
    """Whether the run directory keeps the weights, because the run began at random ones."""

    @classmethod
    def of(cls, config: Config, saved: SavedRun | None) -> TrainedAdapters:
        """Return the adapters of a run; ``saved``: the checkpoint from which it continues, None for a new run.

        Collective: the ranks share the reading of files whose checksums are not known.
        Raises: `ConfigError`; CheckpointError on all ranks where the base is missing, or is not the one of ``saved``.
        """
        if not config.adapter.rank:
            raise ConfigError(f"adapter.load={config.adapter.load} with adapter.rank=0: set the rank of these adapters")
        base = None if config.checkpoint.load is None else Path(config.checkpoint.load)
        is_kept = base is None
        if saved is not None:
            base = base or Path(config.run_dir) / KEPT_BASE
        digest = None if base is None else shared_base_digest(base)
        if saved is not None and base is not None and digest is not None:
            run_on_rank_0(lambda: require_adapters(saved.path)).require_base(digest, base, "checkpoint.load")
        return cls(config.adapter, base, digest, is_kept)

    def load_start(self, config: Config, chunks: Chunks, grid: RankGrid, vocab_size: int, *, is_new: bool) -> None:
        """Give new chunks the weights below the adapters, and then adapters: random ones, or those of ``adapter.load``.

        Every rank of the world calls it.  Raises: `ConfigError`, `CheckpointError`.
        """
        if self.base is not None:
            load_weights(self.base, chunks, vocab_size, config.checkpoint.verify)
        add_adapters(chunks, self.settings, grid)
        if is_new and config.adapter.load is not None:
            first = Path(config.adapter.load)
            assert self.base is not None and self.digest is not None
            adapters = run_on_rank_0(lambda: require_adapters(first))
            adapters.require_base(self.digest, self.base, "checkpoint.load")
            stored_settings(config, adapters)
            load_adapters(adapters.path, chunks, config.checkpoint.verify)

    def start_of(self, chunks: Chunks) -> list[torch.nn.Module]:
        """Return the chunks without their adapters."""
        return [WithoutAdapters(chunk) for chunk in chunks]

    @staticmethod
    def stored(model: dict[str, Any]) -> dict[str, Any]:
        """Return the part of a `state.model_state` that changes in a run with adapters: factors and FP8 statistics."""
        return {
            key: {name: value for name, value in whole.items() if _is_factor(name) or "_extra_state" in name}
            for key, whole in model.items()
        }

    @staticmethod
    def load(chunks: Chunks, loaded: dict[str, Any]) -> None:
        """Copy ``loaded``, the tensors of `stored` from a checkpoint, into the chunks; their weights stay.

        Raises: RuntimeError where factors of the chunks are not in ``loaded``, or the other way round.
        """
        for key, chunk in zip(state.chunk_keys(chunks), chunks, strict=True):
            missing, unexpected = unwrapped(chunk).load_state_dict(loaded[key], strict=False)
            if faults := [*filter(_is_factor, missing), *unexpected]:
                raise RuntimeError(f"expected the factors of the model, got others: {faults[:4]}")

    def texts(
        self, save_frozen: Callable[..., str], path: Path, chunks: Chunks, common: dict[str, Any]
    ) -> dict[str, str]:
        """Return ``adapters.json``, after the random weights below the adapters were saved, which nothing else has."""
        digest, place = self.digest, None
        if self.is_kept:
            digest = save_frozen(
                KEPT_BASE,
                lambda: _without_factors(state.model_state(chunks, CONTENT)),
                self.digest,
                common={**common, "iteration": 0},
                texts=lambda found: {KEPT_DIGEST: json.dumps({"digest": found}) + "\n"},
            )
        elif self.base is not None:
            place = self.base.absolute()
        assert digest is not None, "weights of a checkpoint have a digest, and so have saved ones"
        return {NAME: StoredAdapters(path, self.settings, digest, place).text()}


def with_stored_adapters(config: Config) -> Config:
    """Return ``config`` with the settings of the adapters in ``checkpoint.load``, and rank 0 where it has none.

    Every rank of the world calls it.  Raises: `ConfigError`, `CheckpointError`.
    """
    load = config.checkpoint.load
    adapters = None if load is None else run_on_rank_0(lambda: read_stored_adapters(Path(load)))
    settings = AdapterConfig() if adapters is None else stored_settings(config, adapters)
    return replace(config, adapter=replace(settings, load=config.adapter.load, base=config.adapter.base))


def stored_settings(config: Config, adapters: StoredAdapters) -> AdapterConfig:
    """Return the settings of stored adapters, after a comparison with those of ``config`` where it has adapters.

    Raises: `ConfigError` for an engine that cannot read adapters, and for keys with other values than the stored ones.
    """
    require_engine(adapters.settings, config.rollout)
    if config.adapter.rank:
        ours, theirs = ({name: getattr(it, name) for name in SETTINGS} for it in (config.adapter, adapters.settings))
        # The seed made the first A, which the stored factors replace.
        differing = [name for name in SETTINGS if name != "seed" and ours[name] != theirs[name]]
        if differing:
            faults = "; ".join(f"adapter.{name} is {ours[name]}, expected {theirs[name]}" for name in differing)
            raise ConfigError(f"{adapters.path} holds other adapters: {faults}: set these keys to the stored values")
    return adapters.settings


def load_adapted(config: Config, path: Path, chunks: Chunks, grid: RankGrid, vocab_size: int) -> None:
    """Load the adapters of the checkpoint at ``path``, and the weights below them, into new ``chunks``.

    The weights are at ``adapter.base``, or else where the checkpoint says.
    Every rank of the world calls it.  Raises: `ConfigError`, `CheckpointError`.
    """
    if config.adapter.load is not None:
        raise ConfigError(f"adapter.load={config.adapter.load} is for runs: name this checkpoint instead of {path}")
    adapters, verify = run_on_rank_0(lambda: require_adapters(path)), config.checkpoint.verify
    settings = stored_settings(config, adapters)
    base = run_on_rank_0(lambda: adapters.base_place(config.adapter.base))
    adapters.require_base(shared_base_digest(base), base, "adapter.base")
    require_stored_rank(adapters.path, settings.rank)
    load_weights(base, chunks, vocab_size, verify)
    add_adapters(chunks, settings, grid)
    load_adapters(adapters.path, chunks, verify)


def load_adapters(path: Path, chunks: Chunks, verify: str = "checksums") -> None:
    """Load the factors of a checkpoint of adapters into chunks that have adapters; their weights stay.  Collective.

    ``path`` and ``verify``: as for `load_weights`.
    Raises: CheckpointError before anything is loaded, where a file is torn or factors do not fit the chunks.
    """
    load_weights(path, chunks, verify=verify, part=TrainedAdapters.stored, load=TrainedAdapters.load)


def require_stored_rank(path: Path, rank: int) -> None:
    """Raise CheckpointError on all ranks unless the factors of a checkpoint of adapters have ``rank``.  Collective.

    Call this function before `add_adapters`, which takes memory for ``rank``: a description may say anything.
    """
    found = run_on_rank_0(lambda: directory.resolve(path))
    shapes = run_on_rank_0(lambda: weight_shapes(stored_shapes(found)))
    held = {shape[-2] for key, shape in shapes.items() if key.endswith(f"{ADAPTER_SUFFIX}.a") and len(shape) > 1}
    if held != {rank}:
        raise CheckpointError(f"{found} has factors of the ranks {sorted(held)}, but its {NAME} has the rank {rank}")


def full_weights_of(path: Path, base: str | None) -> Path:
    """Return the checkpoint of the weights below the adapters at ``path``; ``base``: its place, if it has moved."""
    return require_adapters(path).base_place(base)


def _without_factors(model: dict[str, Any]) -> dict[str, Any]:
    return {key: {name: value for name, value in part.items() if not _is_factor(name)} for key, part in model.items()}


def _is_factor(name: str) -> bool:
    return f"{ADAPTER_SUFFIX}." in name
