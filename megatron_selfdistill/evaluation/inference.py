# Copyright (c) 2026 the megatron_selfdistill authors. Apache-2.0.
"""A model that only generates: weights from a checkpoint and a sampler, without optimizer and teacher."""

from __future__ import annotations

import shutil
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path

import torch
import torch.distributed as dist

from megatron_selfdistill.checkpoint.conversion import hf_to_megatron
from megatron_selfdistill.checkpoint.run.adapter_base import AdapterBase, shared_base_digest
from megatron_selfdistill.checkpoint.run.external import load_adapters, load_weights, require_stored_rank
from megatron_selfdistill.checkpoint.stored_adapters import (
    SETTINGS,
    StoredAdapters,
    read_stored_adapters,
    require_adapters,
)
from megatron_selfdistill.config import AdapterConfig, Config
from megatron_selfdistill.config.schema.adapter_checks import require_engine
from megatron_selfdistill.distributed.collectives import gather_objects, run_on_rank_0
from megatron_selfdistill.distributed.ranks import RankGrid
from megatron_selfdistill.errors import ConfigError
from megatron_selfdistill.loss.sharded.vocab_parallel import VocabShard
from megatron_selfdistill.model.adapters import add_adapters
from megatron_selfdistill.model.architecture import transformer_config
from megatron_selfdistill.model.build import build_chunks, unwrapped
from megatron_selfdistill.model.output_layer import OutputLayer, choose_output_layer, unfusable
from megatron_selfdistill.rollout.base import Sampler, SamplingParams
from megatron_selfdistill.rollout.factory import make_sampler, sampling_params
from megatron_selfdistill.run_data import RunData


@dataclass(frozen=True)
class Inference:
    """The model and its sampler on this rank."""

    chunks: list[torch.nn.Module]
    vocab: VocabShard
    sampler: Sampler
    sampling: SamplingParams


@contextmanager
def open_inference(config: Config, run_data: RunData, grid: RankGrid) -> Iterator[Inference]:
    """Open the model of ``checkpoint.load`` with the sampler of ``rollout``, and close the sampler at the end.

    The weights are random if ``checkpoint.load`` is null.
    Every rank of the world enters and leaves this context.  Raises: `ConfigError`, `CheckpointError`.
    """
    config = with_stored_adapters(config)
    chunks = loaded_chunks(config, grid, run_data.vocab_size, config.checkpoint.load)
    vocab = VocabShard.from_group(unwrapped(chunks[-1]).vocab_size, run_data.vocab_size, grid.tp_group)
    sampler = make_sampler(config, run_data, chunks, grid)
    try:
        sampler.update_weights(0)
        yield Inference(chunks, vocab, sampler, sampling_params(config, run_data))
    finally:
        sampler.close()


@contextmanager
def converted(hf: Path, out: Path) -> Iterator[Path]:
    """Convert the Hugging Face directory ``hf`` to the Megatron checkpoint ``out``, and remove ``out`` at the end.

    ``out`` lies on storage that every rank sees; the function replaces what a killed process has left there.
    Every rank of the world enters and leaves this context; rank 0 converts.  Raises: `CheckpointError` on every rank.
    """

    def convert() -> None:
        shutil.rmtree(out, ignore_errors=True)
        hf_to_megatron(hf, out)

    try:
        run_on_rank_0(convert)
        yield out
    finally:
        if dist.get_rank() == 0:
            shutil.rmtree(out, ignore_errors=True)


def loaded_chunks(config: Config, grid: RankGrid, vocab_size: int, checkpoint: str | None) -> list[torch.nn.Module]:
    """Return this rank's chunks of the configured model with the weights of ``checkpoint``; null keeps initial weights.

    Where ``checkpoint`` holds adapters alone, the chunks have these adapters on the weights of their base, which is at
    ``adapter.base``, or else where the checkpoint says.
    Every rank of the world calls it.  Raises: `ConfigError`, `CheckpointError`.
    """
    chunks, verify = new_chunks(config, grid, vocab_size), config.checkpoint.verify
    if checkpoint is None:
        return chunks
    if config.adapter.load is not None:
        raise ConfigError(
            f"adapter.load={config.adapter.load} is for runs: name this checkpoint in place of its base, {checkpoint}"
        )
    path = Path(checkpoint)
    adapters = run_on_rank_0(lambda: read_stored_adapters(path))
    if adapters is None:
        load_weights(path, chunks, vocab_size, verify)
        return chunks
    settings = stored_settings(config, adapters)
    base = run_on_rank_0(lambda: adapters.base_place(config.adapter.base))
    adapters.require_base(shared_base_digest(base), base, "adapter.base")
    require_stored_rank(adapters.path, settings.rank)
    load_weights(base, chunks, vocab_size, verify)
    add_adapters(chunks, settings, grid)
    load_adapters(adapters.path, chunks, verify)
    return chunks


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


def load_first_adapters(config: Config, base: AdapterBase, chunks: Sequence[torch.nn.Module]) -> None:
    """Load the adapters of ``adapter.load`` into the chunks of a new run, after a comparison of base and settings.

    Every rank of the world calls it.  Raises: `ConfigError`, `CheckpointError`.
    """
    assert config.adapter.load is not None and base.load is not None and base.digest is not None
    adapters = run_on_rank_0(lambda: require_adapters(Path(config.adapter.load or "")))
    adapters.require_base(base.digest, base.load, "checkpoint.load")
    stored_settings(config, adapters)
    load_adapters(adapters.path, chunks, config.checkpoint.verify)


def new_chunks(config: Config, grid: RankGrid, vocab_size: int) -> list[torch.nn.Module]:
    """Return this rank's chunks of the configured model, with initial weights."""
    architecture = None
    if config.model.provider is None:
        architecture = transformer_config(config.model, config.parallel, config.optimizer, config.schedule)
    return build_chunks(config.model, architecture, grid, vocab_size)


def decided_output_layer(config: Config, chunks: Sequence[torch.nn.Module]) -> OutputLayer:
    """Return `choose_output_layer` for the model of which this rank holds ``chunks``, equal on all ranks.

    Collectives: one all_gather_object over the world, of the last stages' reasons against fusing.
    Raises: `ConfigError`.
    """
    last = unwrapped(chunks[-1])
    reasons = gather_objects(unfusable(last) if last.post_process else None)
    return choose_output_layer(config, last.vocab_size, next(filter(None, reasons), None))
