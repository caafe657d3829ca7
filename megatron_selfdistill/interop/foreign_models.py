# Copyright (c) 2026 the megatron_selfdistill authors. Apache-2.0.
"""The door of `interop`: read models that no run has saved, as Hugging Face directories and legacy checkpoints."""

from __future__ import annotations

import shutil
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

import torch
import torch.distributed as dist

from megatron_selfdistill.compat import repairs  # noqa: F401  isort: skip  (must come before megatron.core)
from megatron.core.dist_checkpointing.mapping import ShardedTensor

from megatron_selfdistill.checkpoint import sharded_io, state
from megatron_selfdistill.checkpoint.formats import directory
from megatron_selfdistill.checkpoint.formats.model_tensors import NOT_BUILT, Place, raise_misfit, shown
from megatron_selfdistill.checkpoint.formats.torch_dist import CONTENT
from megatron_selfdistill.checkpoint.trained_weights import holds_adapters
from megatron_selfdistill.config import ModelConfig
from megatron_selfdistill.distributed.collectives import gather_objects, run_on_each_rank, run_on_rank_0
from megatron_selfdistill.interop.conversion import hf_to_megatron, megatron_to_hf
from megatron_selfdistill.interop.describe import sizes_of
from megatron_selfdistill.interop.hf.mapping import family_of
from megatron_selfdistill.interop.hf_files import model_directory, read_config
from megatron_selfdistill.interop.legacy import LegacyReader
from megatron_selfdistill.interop.peft_adapters import megatron_to_peft


def hf_model(hf: Path) -> ModelConfig:
    """Return the model of a Hugging Face directory.  Raises: `CheckpointError`, `ConfigError`."""
    description = read_config(hf)
    return family_of(description).model_config(description)


def main_dtype(path: Path) -> torch.dtype:
    """Return the type of most weights of a checkpoint or a Hugging Face directory.  Raises: `CheckpointError`."""
    sizes = sizes_of(path)
    return max(sizes, key=lambda dtype: sizes[dtype])


def convert_found(name: Path, out: Path) -> None:
    """Convert the directory or the model of the hub ``name`` to the Megatron checkpoint ``out``, and say so."""
    hf = model_directory(name)
    print(f"converts {hf} to {out}, once", flush=True)
    partial = out.with_name(f"{out.name}.partial")
    shutil.rmtree(partial, ignore_errors=True)  # what a killed process has left
    hf_to_megatron(hf, partial)
    partial.rename(out)


def export_once(megatron: Path, out: Path) -> Path:
    """Convert the last checkpoint at ``megatron`` to a Hugging Face directory (adapters: PEFT), unless it is there.

    Raises: as `megatron_to_hf`, also for an ``out`` that is older than the checkpoint.
    """
    made = directory.find(megatron)[0].stat().st_mtime
    write = megatron_to_peft if holds_adapters(megatron) else megatron_to_hf
    return out if out.exists() and out.stat().st_mtime >= made else write(megatron, out)


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


@torch.no_grad()
def load_legacy(path: Path, chunks: Sequence[torch.nn.Module], vocab_size: int | None) -> None:
    """Load the weights of a legacy checkpoint into the chunks of this rank; see `external.load_weights`.  Collective.

    Raises: CheckpointError on all ranks before anything is loaded.
    """
    source = run_on_each_rank(lambda: LegacyReader(path))
    shards = sharded_io.tensors(state.model_state(chunks, CONTENT))
    faults: dict[str, None] = {}
    used: set[Place] = set()

    def compare() -> None:
        for shard in shards:
            key, index, expected = sharded_io.place_of(shard)
            place = source.place(key, index)
            if place is None:
                faults[f"{shown(key, index)} is missing"] = None
                continue
            used.add(place)
            found = source.full_shape(place, expected)
            if shard.allow_shape_mismatch and found[1:] == expected[1:]:
                if vocab_size is not None and found[0] < vocab_size:
                    faults[f"{key} has {found[0]} rows, expected at least {vocab_size}"] = None
            elif found != expected:
                faults[f"{shown(key, index)} has shape {list(found)}, expected {list(expected)}"] = None

    run_on_each_rank(compare)
    everyone = gather_objects((list(faults), used))
    unexpected = source.tensors.difference(*(places for _, places in everyone))
    extra = [f"{shown(key, index)} is unexpected" for key, index in sorted(unexpected) if not key.startswith(NOT_BUILT)]
    raise_misfit(path, [*dict.fromkeys(fault for some, _ in everyone for fault in some), *extra])

    def fill() -> None:
        for shard in shards:
            key, index, expected = sharded_io.place_of(shard)
            place = source.place(key, index)
            assert place is not None
            _copy(source.read_at(place, expected), shard)

    with state.gathered_parameters(chunks):
        run_on_each_rank(fill)


def _copy(full: torch.Tensor, shard: ShardedTensor) -> None:
    """Copy the shard's part of the full tensor into the shard; set rows beyond the end, which are padding, to zero."""
    part, target = full, shard.data
    assert target is not None
    offsets = shard.global_offset[shard.prepend_axis_num :]
    for dim, (offset, length) in enumerate(zip(offsets, shard.local_shape, strict=True)):
        start = min(offset, part.shape[dim])
        part = part.narrow(dim, start, min(length, part.shape[dim] - start))
    if part.shape[0] < target.shape[0]:
        target[part.shape[0] :] = 0
        target = target[: part.shape[0]]
    target.copy_(part)
