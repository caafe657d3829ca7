# Copyright (c) 2026 the megatron_selfdistill authors. Apache-2.0.
"""Between sharded state dicts and one torch_dist folder: write under a temporary name, check that it fits, read."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch.distributed.checkpoint import CheckpointException

from megatron_selfdistill import cpu, repairs  # noqa: F401  isort: skip  (must come before megatron.core)
from megatron.core import dist_checkpointing
from megatron.core.dist_checkpointing.dict_utils import nested_values
from megatron.core.dist_checkpointing.mapping import ShardedTensor, is_main_replica
from megatron.core.dist_checkpointing.serialization import get_default_save_sharded_strategy
from megatron.core.dist_checkpointing.state_dict_utils import load_preprocess
from megatron.core.dist_checkpointing.strategies import filesystem_async
from megatron.core.dist_checkpointing.strategies.async_utils import AsyncRequest
from megatron.core.dist_checkpointing.strategies.common import TorchCommonLoadStrategy
from megatron.core.dist_checkpointing.strategies.fully_parallel import FullyParallelSaveStrategyWrapper

from megatron_selfdistill.checkpoint import folder
from megatron_selfdistill.checkpoint.agreement import describe, from_all_ranks, on_each_rank, on_rank_0
from megatron_selfdistill.checkpoint.folder import CheckpointError, Temporary
from megatron_selfdistill.checkpoint.state import CONTENT

# Beside the model in a checkpoint, and no part of it.
_NOT_WEIGHTS = ("optimizer.", "chained_", "rng_state", "rerun_state_machine", "teacher.")
_SHOWN = 4

WRITE_ERRORS = (Exception, CheckpointException)
"""What a failing write raises: torch's own exception is no ``Exception``."""


def begin_write(
    contents: dict[str, Any],
    target: Path,
    *,
    replicas: dist.ProcessGroup | None = None,
    validate: bool = False,
    published: Callable[[], None] = lambda: None,
) -> tuple[AsyncRequest, Temporary]:
    """Megatron's request that writes ``contents``, and the locked temporary folder that it fills.

    Execute the request at once or in the background; its end renames the folder to ``target`` and then runs
    ``published``, both on rank 0.  Afterwards, also after a failure, `Temporary.release` it.
    ``replicas``: ranks that hold equal tensors and share the writing.  ``validate``: check that the ranks' shards
    cover each tensor once.  Collective; raises `CheckpointError` on all ranks.
    """
    needed = sum(from_all_ranks(_num_bytes(contents)))
    # Before the lock: the process that hands over the writers' results outlives the save and must not share it.
    on_each_rank(filesystem_async._get_write_results_queue)
    temporary = _begin_folder(target, needed)
    strategy = get_default_save_sharded_strategy()
    if replicas is not None and replicas.size() > 1:
        strategy = FullyParallelSaveStrategyWrapper(strategy, replicas)
    try:
        request = dist_checkpointing.save(
            contents,
            str(temporary.path),
            strategy,
            validate_access_integrity=validate,
            async_sharded_save=True,
            content_metadata=dict(CONTENT),
        )
    except WRITE_ERRORS as error:
        temporary.release()
        raise CheckpointError(f"could not write {target}: {describe(error)}") from error

    def publish() -> None:
        folder.publish(temporary, target)
        published()

    request.add_finalize_fn(lambda: on_rank_0(publish))
    return request, temporary


def write_now(request: AsyncRequest, temporary: Temporary, target: Path) -> None:
    """Execute what `begin_write` prepared, and release its lock."""
    try:
        request.execute_sync()
    except WRITE_ERRORS as error:
        raise CheckpointError(f"could not write {target}: {describe(error)}") from error
    finally:
        temporary.release()


def read(wanted: dict[str, Any], path: Path) -> dict[str, Any]:
    """The tensors and sharded objects of ``wanted``, read mostly in place; no pickle beside them is executed."""
    return dist_checkpointing.load(
        wanted, str(path), common_strategy=_NothingInCommon(), validate_access_integrity=False
    )


def read_common(path: Path) -> dict[str, Any]:
    """What a checkpoint holds besides tensors."""
    return dist_checkpointing.load_common_state_dict(str(path))


def require_fit(
    wanted: dict[str, Any], path: Path, *, only_weights: bool = False, vocab_size: int | None = None
) -> None:
    """Raise one sentence on all ranks unless the checkpoint has each tensor that some rank wants, in its shape.

    ``only_weights``: it must have no further weights either.  Of tensors whose rows are padded (embedding, output
    layer) the number of rows may differ, but be no smaller than ``vocab_size``.  Reads no tensor data.
    """
    expected: dict[str, tuple[tuple[int, ...], bool]] = {}
    for theirs in from_all_ranks({t.key: (tuple(t.global_shape), t.allow_shape_mismatch) for t in tensors(wanted)}):
        expected |= theirs
    stored = on_rank_0(lambda: _stored_shapes(path))
    faults = [f"{key} is missing" for key in sorted(expected.keys() - stored.keys())]
    if only_weights:
        extra = (key for key in stored.keys() - expected.keys() if not key.startswith(_NOT_WEIGHTS))
        faults += [f"{key} is unexpected" for key in sorted(extra)]
    for key in sorted(expected.keys() & stored.keys()):
        (shape, padded), found = expected[key], stored[key]
        if padded and found[1:] == shape[1:]:
            if vocab_size is not None and found[0] < vocab_size:
                faults.append(f"{key} has {found[0]} rows, expected at least {vocab_size}")
        elif found != shape:
            faults.append(f"{key} has shape {list(found)}, expected {list(shape)}")
    if faults:
        more = f"; and {len(faults) - _SHOWN} more" if len(faults) > _SHOWN else ""
        raise CheckpointError(f"{path} does not fit this model: {'; '.join(faults[:_SHOWN])}{more}")


def tensors(contents: dict[str, Any]) -> Sequence[ShardedTensor]:
    """The sharded tensors as they lie in a checkpoint, those of Megatron's factories included."""
    plain, _, _ = load_preprocess(contents)
    return [value for value in nested_values(plain) if isinstance(value, ShardedTensor)]


class _NothingInCommon(TorchCommonLoadStrategy):
    """Leaves common.pt unread: it holds a lab's pickled arguments, whose classes need not exist here."""

    def load_common(self, checkpoint_dir: Any) -> dict[str, Any]:
        return {}


def _begin_folder(target: Path, num_bytes: int) -> Temporary:
    """`folder.begin` on rank 0, and every rank's hold on the lock."""
    begun: list[Temporary] = []

    def begin() -> Path:
        begun.append(folder.begin(target.parent, target.name, num_bytes))
        return begun[0].path

    path = on_rank_0(begin)
    return on_each_rank(lambda: begun[0] if begun else Temporary(path).hold())


def _stored_shapes(path: Path) -> dict[str, tuple[int, ...]]:
    metadata = dist_checkpointing.load_tensors_metadata(str(path))
    return {key: tuple(tensor.global_shape) for key, tensor in metadata.items()}


def _num_bytes(contents: dict[str, Any]) -> int:
    """Of the tensors whose first holder this rank is."""
    data = [value.data for value in nested_values(contents) if is_main_replica(getattr(value, "replica_id", 1))]
    return sum(tensor.numel() * tensor.element_size() for tensor in data if torch.is_tensor(tensor))
