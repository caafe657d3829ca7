# Copyright (c) 2026 the megatron_selfdistill authors. Apache-2.0.
"""A model that only generates: weights from a checkpoint and a sampler, without optimizer and teacher."""

from __future__ import annotations

import shutil
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import torch
import torch.distributed as dist

from megatron_selfdistill.checkpoint.conversion import hf_to_megatron
from megatron_selfdistill.checkpoint.run.external import has_adapters, load_weights
from megatron_selfdistill.config import Config
from megatron_selfdistill.distributed.collectives import gather_objects, run_on_rank_0
from megatron_selfdistill.distributed.ranks import RankGrid
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

    Where ``adapter.rank`` is not 0 the chunks have adapters: those of the checkpoint, or new ones where it has none.
    Every rank of the world calls it.  Raises: `ConfigError`, `CheckpointError`.
    """
    chunks, verify = new_chunks(config, grid, vocab_size), config.checkpoint.verify
    path = None if checkpoint is None else Path(checkpoint)
    adds = config.adapter.rank > 0
    if adds and path is not None and has_adapters(path):
        add_adapters(chunks, config.adapter, grid)
        adds = False
    if path is not None:
        load_weights(path, chunks, vocab_size, verify)
    if adds:
        add_adapters(chunks, config.adapter, grid)
    return chunks


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
