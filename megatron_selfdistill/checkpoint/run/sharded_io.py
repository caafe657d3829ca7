# Copyright (c) 2026 the megatron_selfdistill authors. Apache-2.0.
"""Between sharded state dicts and one torch_dist directory: write under a temporary name, check that it fits, read."""

from __future__ import annotations

import contextlib
import functools
import io
import pickle
import re
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch.distributed.checkpoint import CheckpointException, DefaultLoadPlanner, FileSystemReader, default_planner
from torch.distributed.checkpoint.metadata import Metadata, StorageMeta
from torch.distributed.checkpoint.planner import ReadItem

from megatron_selfdistill.compat import repairs  # noqa: F401  isort: skip  (must come before megatron.core)
from megatron.core import dist_checkpointing
from megatron.core.dist_checkpointing.dict_utils import nested_values
from megatron.core.dist_checkpointing.mapping import ShardedTensor, is_main_replica
from megatron.core.dist_checkpointing.serialization import get_default_save_sharded_strategy
from megatron.core.dist_checkpointing.state_dict_utils import load_preprocess
from megatron.core.dist_checkpointing.strategies import filesystem_async
from megatron.core.dist_checkpointing.strategies.async_utils import AsyncRequest
from megatron.core.dist_checkpointing.strategies.common import TorchCommonLoadStrategy
from megatron.core.dist_checkpointing.strategies.fully_parallel import FullyParallelSaveStrategyWrapper

from megatron_selfdistill.checkpoint import directory
from megatron_selfdistill.checkpoint.directory import Temporary
from megatron_selfdistill.checkpoint.formats import manifest
from megatron_selfdistill.checkpoint.formats.full_weights import NOT_BUILT, NOT_WEIGHTS
from megatron_selfdistill.checkpoint.formats.torch_dist_reader import TorchDistReader
from megatron_selfdistill.checkpoint.formats.unpickler import load_metadata, load_pickled, loads_pickled
from megatron_selfdistill.checkpoint.run.state import CONTENT
from megatron_selfdistill.distributed.collectives import describe, from_all_ranks, on_each_rank, on_rank_0
from megatron_selfdistill.errors import CheckpointError

_SHOWN = 4

WRITE_ERRORS = (Exception, CheckpointException)
"""What a failing write raises: torch's own exception is no ``Exception``."""


def begin_write(
    contents: dict[str, Any],
    target: Path,
    *,
    replicas: dist.ProcessGroup | None = None,
    validate: bool = False,
    prove_ownership: Callable[[], None] = lambda: None,
    published: Callable[[], None] = lambda: None,
) -> tuple[AsyncRequest, Temporary]:
    """Megatron's request that writes ``contents``, and the locked temporary directory that it fills.

    Execute the request at once or in the background; its end calls ``prove_ownership``, renames the directory to
    ``target`` and then runs ``published``, all on rank 0.  Afterwards, also after a failure, `Temporary.release` it.
    ``prove_ownership`` raises `CheckpointError` where another run has taken the run directory over, for instance while
    this one was suspended in the middle of the save: then nothing gets the name ``target``.
    ``replicas``: ranks that hold equal tensors and share the writing.  ``validate``: check that the ranks' shards
    cover each tensor once.  Collective; raises `CheckpointError` on all ranks.
    """
    needed = sum(from_all_ranks(_num_bytes(contents)))
    # Before the lock: the process that hands over the writers' results outlives the save and must not share it.
    on_each_rank(filesystem_async._get_write_results_queue)
    temporary = _begin_directory(target, needed)
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
        prove_ownership()
        directory.publish(temporary, target)
        published()

    if request.async_fn is not None:  # None on a rank without anything to write
        request = request._replace(async_fn=functools.partial(_write_and_sum_up, request.async_fn, temporary.path))
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


def forget_results() -> None:
    """Drop what this rank's writers have reported of a save that nobody completes: the next save would read it."""
    results = filesystem_async._get_write_results_queue()
    while not results.empty():
        results.get()


def read(wanted: dict[str, Any], path: Path) -> dict[str, Any]:
    """Return the tensors and sharded objects of ``wanted``, read mostly in place.  Collective.

    Every pickle on the way (``.metadata``, sharded objects, Transformer Engine's states) is read by the restricted
    unpickler; common.pt is not read at all.  Raises: `CheckpointError` on all ranks for what cannot be read.
    """
    try:
        with _restricted_readers():
            loaded = dist_checkpointing.load(
                wanted, str(path), common_strategy=_NothingInCommon(), validate_access_integrity=False
            )
    except CheckpointException as error:  # one failure for each rank that has one, the same on all ranks
        first = error.failures[min(error.failures)][0]
        raise CheckpointError(f"{path} could not be read: {describe(first)}") from None
    on_each_rank(lambda: _rewrite_extra_states(loaded))
    return loaded


def read_common(path: Path) -> dict[str, Any]:
    """Return what a checkpoint holds besides tensors, read by the restricted unpickler."""
    return load_pickled(path / "common.pt")


def stored_shapes(path: Path) -> dict[str, tuple[int, ...]]:
    """Key -> shape of every tensor in a torch_dist checkpoint; no pickle but a restricted one is read."""
    return TorchDistReader(path).shapes


def stored_keys(path: Path) -> set[str]:
    """Return the keys of all tensors and objects in a torch_dist checkpoint, as its ``.metadata`` spells them."""
    return set(load_metadata(path).state_dict_metadata)


def check_shapes(
    wanted: dict[str, Any], path: Path, *, only_weights: bool = False, vocab_size: int | None = None
) -> None:
    """Raise one sentence on all ranks unless the checkpoint has each tensor that some rank wants, in its shape.

    ``only_weights``: it must have no further weights either.  Of tensors whose rows are padded (embedding, output
    layer) the number of rows may differ, but be no smaller than ``vocab_size``.  Reads no tensor data.
    """
    expected: dict[str, tuple[tuple[int, ...], bool]] = {}
    for theirs in from_all_ranks({t.key: (tuple(t.global_shape), t.allow_shape_mismatch) for t in tensors(wanted)}):
        expected |= theirs
    stored = on_rank_0(lambda: stored_shapes(path))
    faults = [f"{key} is missing" for key in sorted(expected.keys() - stored.keys())]
    if only_weights:
        extra = (key for key in stored.keys() - expected.keys() if not key.startswith(NOT_WEIGHTS + NOT_BUILT))
        faults += [f"{key} is unexpected" for key in sorted(extra)]
    for key in sorted(expected.keys() & stored.keys()):
        (shape, padded), found = expected[key], stored[key]
        if padded and found[1:] == shape[1:]:
            if vocab_size is not None and found[0] < vocab_size:
                faults.append(f"{key} has {found[0]} rows, expected at least {vocab_size}")
        elif found != shape:
            faults.append(f"{key} has shape {list(found)}, expected {list(shape)}")
    raise_first(path, faults)


def raise_first(path: Path, faults: Sequence[str]) -> None:
    """Raise `CheckpointError` with the first of ``faults``, which are equal on all ranks, if there are any."""
    if faults:
        more = f"; and {len(faults) - _SHOWN} more" if len(faults) > _SHOWN else ""
        raise CheckpointError(f"{path} does not fit this model: {'; '.join(faults[:_SHOWN])}{more}")


def tensors(contents: dict[str, Any]) -> Sequence[ShardedTensor]:
    """The sharded tensors as they lie in a checkpoint, those of Megatron's factories included."""
    plain, _, _ = load_preprocess(contents)
    return [value for value in nested_values(plain) if isinstance(value, ShardedTensor)]


def damage(path: Path, verify: str) -> str | None:
    """Why the checkpoint at ``path`` is not whole ("has a damaged __0_0.distcp: ..."), or None; equal on all ranks.

    ``verify``: ``none`` looks only at what Megatron itself stores; ``sizes`` compares the lengths of all files with the
    manifest, which a checkpoint of this program must have; ``checksums`` also reads them, each on one rank, which warms
    the cache for the load that follows.  Collective.
    """
    reason = on_rank_0(
        lambda: directory.incomplete(path) or (directory.unverifiable(path) if verify != "none" else None)
    )
    if reason is not None or verify != "checksums":
        return reason

    def check() -> str | None:
        entries = manifest.read(path)
        if entries is None:  # another program's
            return None
        return manifest.wrong_contents(path, entries, dist.get_rank(), dist.get_world_size())

    return next((fault for fault in from_all_ranks(on_each_rank(check)) if fault is not None), None)


def verify_integrity(path: Path, verify: str) -> None:
    """Raise `CheckpointError` on all ranks where `damage` finds some; it offers the newest complete one nearby."""
    fault = damage(path, verify)
    if fault is not None:
        raise CheckpointError(f"{path} {fault}{on_rank_0(lambda: directory.instead_of(path))}")


@contextlib.contextmanager
def _restricted_readers() -> Iterator[None]:
    """Let PyTorch's reader of torch_dist directories, which Megatron uses, unpickle by the restricted unpickler.

    PyTorch itself calls ``pickle.load`` for ``.metadata`` and ``torch.load(weights_only=False)`` for objects.
    """

    def read_metadata(self: FileSystemReader, *args: Any, **options: Any) -> Metadata:
        metadata = load_metadata(Path(self.path))
        metadata.storage_meta = metadata.storage_meta or StorageMeta()
        metadata.storage_meta.load_id = self.load_id
        return metadata

    def load_bytes(self: DefaultLoadPlanner, read_item: ReadItem, value: io.BytesIO) -> None:
        key = read_item.dest_index.fqn
        loaded = loads_pickled(value, key)
        if self.flatten_state_dict:
            default_planner.set_element(self.original_state_dict, self.mappings[key], loaded)
        else:
            self.state_dict[key] = loaded

    own = FileSystemReader.read_metadata, DefaultLoadPlanner.load_bytes
    FileSystemReader.read_metadata, DefaultLoadPlanner.load_bytes = read_metadata, load_bytes  # type: ignore[method-assign]
    try:
        yield
    finally:
        FileSystemReader.read_metadata, DefaultLoadPlanner.load_bytes = own  # type: ignore[method-assign]


_EXTRA_STATE = re.compile(r"_extra_state\d*$")


def _rewrite_extra_states(loaded: Any) -> None:
    """Replace each ``_extra_state`` that is a pickle by the same one, pickled here; grouped experts number theirs.

    Transformer Engine's layers unpickle their FP8 statistics without any restriction: what they get must be ours.
    """
    items = loaded.items() if isinstance(loaded, dict) else enumerate(loaded) if isinstance(loaded, list) else ()
    for key, value in list(items):
        if not _EXTRA_STATE.search(str(key)):
            _rewrite_extra_states(value)
        elif torch.is_tensor(value) and value.numel():
            state = loads_pickled(value.detach().cpu().numpy().tobytes(), str(key))
            loaded[key] = torch.frombuffer(bytearray(pickle.dumps(state)), dtype=torch.uint8)
        elif isinstance(value, io.BytesIO) and value.getbuffer().nbytes:
            value.seek(0)
            loaded[key] = io.BytesIO()
            torch.save(loads_pickled(value, str(key)), loaded[key])
            loaded[key].seek(0)


class _NothingInCommon(TorchCommonLoadStrategy):
    """Leaves common.pt unread: it holds a lab's pickled arguments, whose classes need not exist here."""

    def load_common(self, checkpoint_dir: Any) -> dict[str, Any]:
        return {}


def _write_and_sum_up(
    write: Callable[..., None], path: Path, rank: int, buckets: Any, *more: Any, **options: Any
) -> None:
    """Megatron's writer of this rank, then the checksums of its files, in the background too and on its own machine."""
    write(rank, buckets, *more, **options)
    with contextlib.suppress(OSError):  # one rank must not miss the barrier; rank 0 sums up what no rank did
        manifest.write_part(path, str(rank), [Path(file) for file, _, _ in buckets])


def _begin_directory(target: Path, num_bytes: int) -> Temporary:
    """`directory.begin` on rank 0, and every rank's hold on the lock."""
    begun: list[Temporary] = []

    def begin() -> Path:
        begun.append(directory.begin(target.parent, target.name, num_bytes))
        return begun[0].path

    path = on_rank_0(begin)
    return on_each_rank(lambda: begun[0] if begun else Temporary(path).hold())


def _num_bytes(contents: dict[str, Any]) -> int:
    """Of the tensors whose first holder this rank is."""
    data = [value.data for value in nested_values(contents) if is_main_replica(getattr(value, "replica_id", 1))]
    return sum(tensor.numel() * tensor.element_size() for tensor in data if torch.is_tensor(tensor))
