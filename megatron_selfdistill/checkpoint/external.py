# Copyright (c) 2026 the megatron_selfdistill authors. Apache-2.0.
"""Load weights from checkpoints of any Megatron program: torch_dist or legacy, TE or local layers, in any layout."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import torch

from megatron_selfdistill.compat import repairs  # noqa: F401  isort: skip  (must come before megatron.core)
from megatron.core.dist_checkpointing.dict_utils import nested_items_iter, nested_values
from megatron.core.dist_checkpointing.mapping import (
    LocalNonpersistentObject,
    ShardedObject,
    ShardedTensor,
    ShardedTensorFactory,
)
from megatron.core.optimizer import MegatronOptimizer

from megatron_selfdistill.annexes import door
from megatron_selfdistill.checkpoint import sharded_io, state
from megatron_selfdistill.checkpoint.formats import directory
from megatron_selfdistill.checkpoint.formats.directory import find
from megatron_selfdistill.checkpoint.formats.model_tensors import has_numbered_layers, names, non_finite, shown
from megatron_selfdistill.checkpoint.formats.torch_dist import CONTENT, read_common, stored_shapes
from megatron_selfdistill.distributed.collectives import gather_objects, run_on_each_rank, run_on_rank_0
from megatron_selfdistill.errors import CheckpointError, first_few

Chunks = Sequence[torch.nn.Module]


def load_weights(
    path: Path,
    chunks: Chunks,
    vocab_size: int | None = None,
    verify: str = "checksums",
    *,
    part: Callable[[dict[str, Any]], dict[str, Any]] = lambda model: model,
    load: Callable[[Chunks, dict[str, Any]], None] = state.load_model_state,
) -> int:
    """Load the weights of a model from a checkpoint of any writer, and return its iteration; collective.

    ``path``: an ``iter_`` or ``release`` directory, or the directory with Megatron's tracker file, in the torch_dist or
    the legacy format (``mp_rank_*``); the iteration of ``release`` is 0.  ``vocab_size``: the number of valid rows of
    the vocabulary, all of which the checkpoint must have; padding rows that the checkpoint lacks become zero.
    ``verify``: what the function compares with the checkpoint's manifest, ``checksums`` or ``sizes``; checkpoints of
    other programs have no manifest.  ``part``: returns the part of a `state.model_state` that is loaded, and ``load``
    copies it into the chunks; both for the torch_dist format.  No pickle runs code.  With an optimizer that keeps
    float32 main parameters, call the optimizer's ``reload_model_params`` afterwards.

    Raises: CheckpointError before anything is loaded; the message names a torn file, or the first tensors that are
    missing, unexpected or of another shape.
    """
    found, is_legacy = run_on_rank_0(lambda: find(path))
    if is_legacy:
        door("interop").load_legacy(found, chunks, vocab_size)
        _require_finite(found, state.model_state(chunks, CONTENT), vocab_size)
        return directory.iteration_of(found)
    sharded_io.verify_integrity(found, verify)
    wanted = part(_wanted(chunks, run_on_rank_0(lambda: set(stored_shapes(found)))))
    sharded_io.check_shapes(wanted, found, only_weights=True, vocab_size=vocab_size)
    with state.gathered_parameters(chunks):
        load(chunks, sharded_io.read(wanted, found))
        _require_finite(found, part(state.model_state(chunks, CONTENT)), vocab_size)
    return directory.iteration_of(found)


def load_weights_and_optimizer(
    path: Path, chunks: Chunks, optimizer: MegatronOptimizer, vocab_size: int | None = None, verify: str = "checksums"
) -> int:
    """Load weights as `load_weights` does, with the optimizer's moments and main parameters; return the iteration.

    Collective.  The checkpoint must be a torch_dist checkpoint of the same kind of optimizer.  The layout may differ if
    the checkpoint was saved as ``fully_reshardable``, with ``--ckpt-fully-parallel-save``, or without the distributed
    optimizer.  The hyperparameters and the learning-rate schedule of this run stay.  Call this function instead of
    `load_weights`, after the optimizer was built.

    Raises: CheckpointError before anything is loaded, as `load_weights` does, and for a checkpoint without optimizer
    state or with the state of another kind of optimizer.
    """
    found = run_on_rank_0(lambda: directory.resolve(path))
    sharded_io.verify_integrity(found, verify)
    common = run_on_each_rank(lambda: read_common(found))
    content = common.get("content_metadata") or CONTENT
    with state.gathered_parameters(chunks):
        model = _wanted(chunks, run_on_rank_0(lambda: set(stored_shapes(found))), content)
        optimizer_state = state.optimizer_state(optimizer, model, content, is_loading=True)
        wanted = {**model, "optimizer": optimizer_state}
        sharded_io.check_shapes(wanted, found, vocab_size=vocab_size)
        loaded = sharded_io.read(wanted, found)
        state.load_model_state(chunks, loaded)
        _require_finite(found, state.model_state(chunks, CONTENT), vocab_size)
        state.load_optimizer_state(optimizer, optimizer_state, loaded["optimizer"], _optimizer_steps(common))
    return directory.iteration_of(found)


def _require_finite(path: Path, model: dict[str, Any], vocab_size: int | None = None) -> None:
    """Raise CheckpointError on all ranks, naming the first tensors, if a tensor is NaN or infinite; collective.

    ``model``: the result of `state.model_state`, or a part of it.  The function ignores padding rows of the vocabulary,
    which other programs leave uninitialised.
    """

    def named() -> Iterator[tuple[str, torch.Tensor]]:
        for shard in sharded_io.tensors(model):
            key, index, _ = sharded_io.place_of(shard)
            data = shard.data
            if shard.allow_shape_mismatch and vocab_size is not None:
                data = data[: max(vocab_size - shard.global_offset[shard.prepend_axis_num], 0)]
            yield shown(key, index), data

    faults = dict.fromkeys(name for names in gather_objects(non_finite(named())) for name in names)
    if faults:
        raise CheckpointError(
            f"{path} has NaN or infinite elements in {first_few(list(faults), ', ')}: take an earlier checkpoint"
        )


def _optimizer_steps(common: dict[str, Any]) -> int:
    """Return the number of updates for Adam's bias correction: the stored number, else one per iteration."""
    counts = (int(value) for _, key, value in nested_items_iter(common["optimizer"]) if key in ("step", "common_step"))
    return max(counts, default=int(common.get("iteration") or 0))


def _wanted(chunks: Chunks, stored: set[str], content: dict[str, Any] = CONTENT) -> dict[str, Any]:
    """Return the model's sharded state dict with the keys under which the checkpoint stores its tensors."""
    content = dict(content)
    if has_numbered_layers(stored):
        content["non_homogeneous_layers"] = True
    wanted = state.model_state(chunks, content)
    for model in wanted.values():
        for name, value in model.items():
            if isinstance(value, ShardedObject):
                # Keep this model's FP8 statistics of Transformer Engine: the checkpoint's are pickles.
                model[name] = LocalNonpersistentObject(value.data)
    for value in nested_values(wanted):
        if isinstance(value, ShardedTensor | ShardedTensorFactory) and value.key not in stored:
            value.key = next((name for name in names(value.key) if name in stored), value.key)
    return wanted
