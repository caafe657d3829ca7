# Copyright (c) 2026 the megatron_selfdistill authors. Apache-2.0.
"""Write sharded state dicts into a torch_dist directory, verify the directory, and read it back; all collective."""

from __future__ import annotations

import contextlib
import functools
import io
import multiprocessing
import pickle
import queue
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch.distributed.checkpoint._traverse import set_element
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.checkpoint.default_planner import DefaultLoadPlanner
from torch.distributed.checkpoint.filesystem import FileSystemReader
from torch.distributed.checkpoint.metadata import Metadata, StorageMeta
from torch.distributed.checkpoint.planner import ReadItem

from megatron_selfdistill.compat import older_megatron, repairs  # noqa: F401  isort: skip  (before megatron.core)
from megatron.core import dist_checkpointing
from megatron.core.dist_checkpointing.dict_utils import merge, nested_values
from megatron.core.dist_checkpointing.mapping import ShardedTensor, apply_factory_merges, is_main_replica
from megatron.core.dist_checkpointing.serialization import get_default_save_sharded_strategy
from megatron.core.dist_checkpointing.state_dict_utils import load_preprocess
from megatron.core.dist_checkpointing.strategies import filesystem_async
from megatron.core.dist_checkpointing.strategies.async_utils import AsyncRequest, _disable_gc
from megatron.core.dist_checkpointing.strategies.fully_parallel import FullyParallelSaveStrategyWrapper
from megatron.core.dist_checkpointing.strategies.torch import TorchDistLoadShardedStrategy
from megatron.core.dist_checkpointing.utils import extract_sharded_base, force_all_tensors_to_non_fp8

from megatron_selfdistill.checkpoint.formats import directory, manifest
from megatron_selfdistill.checkpoint.formats.model_tensors import NOT_BUILT, NOT_WEIGHTS, raise_misfit
from megatron_selfdistill.checkpoint.formats.torch_dist import CONTENT, WRITTEN_WITH, stored_shapes
from megatron_selfdistill.checkpoint.formats.unpickler import load_metadata, loads_pickled
from megatron_selfdistill.distributed.collectives import (
    error_message,
    gather_items,
    gather_objects,
    run_on_each_rank,
    run_on_rank_0,
)
from megatron_selfdistill.distributed.integers import max_over_ranks
from megatron_selfdistill.distributed.stop import how_ended
from megatron_selfdistill.errors import CheckpointError

WRITE_ERRORS = (Exception, CheckpointException)
"""The exceptions of a failed write; torch's `CheckpointException` is not an ``Exception``."""


def begin_write(
    contents: dict[str, Any],
    target: Path,
    *,
    replicas: dist.ProcessGroup | None = None,
    validate: bool = False,
    prove_ownership: Callable[[], None] = lambda: None,
    published: Callable[[], None] = lambda: None,
    texts: Mapping[str, str] | None = None,
) -> tuple[AsyncRequest, Path]:
    """Return Megatron's request to write ``contents``, and the temporary directory of the request; collective.

    The caller executes the request at once or in the background.  At its end rank 0 calls ``prove_ownership``, renames
    the directory to ``target`` and calls ``published``.  ``prove_ownership`` raises `CheckpointError` where another run
    has taken the run directory over, for instance while this run was suspended in the middle of the save; then rank 0
    does not rename the directory.
    ``replicas``: the group of ranks that hold equal tensors and share the writing.  ``validate``: check that the shards
    of all ranks cover each tensor once.  ``texts``: further files of the directory, by their names.

    Raises: `CheckpointError` on all ranks.
    """
    needed = sum(gather_objects(_num_bytes(contents)))
    # Here, because a rank that fails to start its queue inside Megatron's save would leave the other ranks waiting.
    run_on_each_rank(filesystem_async.get_write_results_queue)
    temporary = run_on_rank_0(lambda: directory.begin(target.parent, target.name, needed))
    strategy = get_default_save_sharded_strategy()
    if replicas is not None and replicas.size() > 1:
        strategy = FullyParallelSaveStrategyWrapper(strategy, replicas)
    try:
        request = dist_checkpointing.save(
            {**contents, WRITTEN_WITH: older_megatron.version_text()},
            str(temporary),
            strategy,
            validate_access_integrity=validate,
            async_sharded_save=True,
            content_metadata=dict(CONTENT),
            **older_megatron.save_options(),
        )
    except WRITE_ERRORS as error:
        raise unwritten(str(target), error) from error

    def publish() -> None:
        prove_ownership()
        for name, text in (texts or {}).items():
            (temporary / name).write_text(text, encoding="utf-8")
        directory.publish(temporary, target)
        published()

    if request.async_fn is not None:  # None on a rank that has nothing to write
        request = request._replace(async_fn=functools.partial(_write_with_checksums, request.async_fn, temporary))
    request.add_finalize_fn(lambda: run_on_rank_0(publish))
    return request, temporary


def write_now(request: AsyncRequest, target: Path) -> None:
    """Execute the request of `begin_write` for ``target`` now."""
    try:
        request.execute_sync()
    except WRITE_ERRORS as error:
        raise unwritten(str(target), error) from error


def unwritten(what: str, error: BaseException) -> CheckpointError:
    """Return the error of a rank that could not write ``what``, in one sentence."""
    if isinstance(error, CheckpointException):  # the failures by rank, which only rank 0 knows
        first = min(error.failures.items(), default=None)
        error = first[1][0] if first is not None else RuntimeError("Worker failure: rank 0 says why")
    reason = error_message(error).removeprefix("RuntimeError: Worker failure: ")
    return CheckpointError(f"could not write {what}: {reason}")


def report_death(code: int) -> None:
    """Report as a failed write that this rank's process in the background ended with ``code`` before it reported."""
    results = filesystem_async.get_write_results_queue()
    try:
        found = results.get_nowait()
    except queue.Empty:
        found = ChildProcessError(f"the process that writes its files ended by {how_ended(code)}")
    results.put(found)


def forget_results() -> None:
    """Drop the results that this rank's writers reported for an abandoned save; the next save would read them."""
    results = filesystem_async.get_write_results_queue()
    with contextlib.suppress(queue.Empty):
        while True:
            results.get_nowait()


def read(wanted: dict[str, Any], path: Path) -> dict[str, Any]:
    """Return ``wanted`` with the tensors and sharded objects of the checkpoint, mostly read in place; collective.

    The restricted unpickler reads every pickle (``.metadata``, sharded objects, Transformer Engine's states).
    Megatron's ``load`` would also read the state that is no tensor, whose arguments may need classes that are not here.

    Raises: `CheckpointError` on all ranks where the checkpoint cannot be read.
    """
    try:
        with _restricted_readers():
            force_all_tensors_to_non_fp8(wanted)
            sharded, plain, factories = load_preprocess(wanted)
            sharded, _ = extract_sharded_base(sharded)
            merge(plain, TorchDistLoadShardedStrategy().load(sharded, str(path)))
            loaded: dict[str, Any] = apply_factory_merges(plain, factories)
    except CheckpointException as error:  # the failures by rank, equal on all ranks
        first = error.failures[min(error.failures)][0]
        raise CheckpointError(f"{path} could not be read: {error_message(first)}") from None
    run_on_each_rank(lambda: _rewrite_extra_states(loaded))
    return loaded


def check_shapes(
    wanted: dict[str, Any], path: Path, *, only_weights: bool = False, vocab_size: int | None = None
) -> None:
    """Raise `CheckpointError` on all ranks unless the checkpoint has each wanted tensor of each rank, in its shape.

    Collectives: a broadcast of the stored shapes, a maximum of one integer per stored tensor, and the ranks' faults.
    ``only_weights``: the checkpoint must not have further weights.  For tensors with padded rows (embedding, output
    layer) the number of rows may differ, but must be at least ``vocab_size``.  The function reads no tensor data.
    """
    stored = run_on_rank_0(lambda: stored_shapes(path))
    expected = {t.key: (tuple(t.global_shape), t.allow_shape_mismatch) for t in tensors(wanted)}
    faults = [f"{key} is missing" for key in sorted(expected.keys() - stored.keys())]
    if only_weights:
        known = max_over_ranks([key in expected or key.startswith(NOT_WEIGHTS + NOT_BUILT) for key in stored])
        faults += [f"{key} is unexpected" for key, is_known in sorted(zip(stored, known, strict=True)) if not is_known]
    for key in sorted(expected.keys() & stored.keys()):
        (shape, padded), found = expected[key], stored[key]
        if padded and found[1:] == shape[1:]:
            if vocab_size is not None and found[0] < vocab_size:
                faults.append(f"{key} has {found[0]} rows, expected at least {vocab_size}")
        elif found != shape:
            faults.append(f"{key} has shape {list(found)}, expected {list(shape)}")
    raise_misfit(path, list(dict.fromkeys(gather_items(faults))))


def tensors(contents: dict[str, Any]) -> Sequence[ShardedTensor]:
    """Return the sharded tensors as a checkpoint stores them, including the tensors of Megatron's factories."""
    plain, _, _ = load_preprocess(contents)
    return [value for value in nested_values(plain) if isinstance(value, ShardedTensor)]


def place_of(shard: ShardedTensor) -> tuple[str, tuple[int, ...], tuple[int, ...]]:
    """Return the key, the index over layers and experts, and the shape of the full tensor of ``shard``."""
    stacked = shard.prepend_axis_num
    return shard.key, tuple(shard.global_offset[:stacked]), tuple(shard.global_shape[stacked:])


def integrity_fault(path: Path, verify: str) -> str | None:
    """Return the fault of the checkpoint at ``path`` ("has a corrupt __0_0.distcp: ..."), or None, on all ranks.

    Collective.  ``verify``: ``none`` checks only the files that Megatron itself stores.  ``sizes`` also compares the
    sizes of all files with the manifest, which a checkpoint of this program must have.  ``checksums`` also compares the
    checksums; each rank reads a share of the files, which warms the file cache for the load that follows.
    """
    reason = run_on_rank_0(
        lambda: directory.incomplete(path) or (directory.unverifiable(path) if verify != "none" else None)
    )
    if reason is not None or verify != "checksums":
        return reason

    def check() -> str | None:
        entries = manifest.read(path)
        if entries is None:  # another program saved the checkpoint
            return None
        return manifest.wrong_contents(path, entries, dist.get_rank(), dist.get_world_size())

    return next((fault for fault in gather_objects(run_on_each_rank(check)) if fault is not None), None)


def verify_integrity(path: Path, verify: str) -> None:
    """Raise `CheckpointError` on all ranks for an `integrity_fault`."""
    fault = integrity_fault(path, verify)
    if fault is not None:
        raise CheckpointError(f"{path} {fault}")


@contextlib.contextmanager
def _restricted_readers() -> Iterator[None]:
    """Make PyTorch's reader of torch_dist directories, which Megatron uses, unpickle with the restricted unpickler.

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
            set_element(self.original_state_dict, self.mappings[key], loaded)
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
    """Replace each pickled ``_extra_state`` by a new pickle of its contents; grouped experts number their states.

    Transformer Engine's layers unpickle their FP8 statistics without any restriction, so they must receive a pickle of
    this process.
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


def _write_with_checksums(write: functools.partial[None], path: Path, rank: int, buckets: Any, results: Any) -> None:
    """Write the files of this rank, then compute their checksums on the same machine; the result goes to ``results``.

    ``write``: Megatron's function for the same files.  It waits for ever for a process that a signal has ended.
    """
    results.put(_written(buckets, *write.args))
    with contextlib.suppress(OSError):  # no rank may miss the barrier; rank 0 computes missing checksums
        manifest.write_part(path, str(rank), [Path(file) for file, _, _ in buckets])


@_disable_gc()  # type: ignore[untyped-decorator]
def _written(buckets: Sequence[Any], *how: Any) -> dict[int, Any] | Exception:
    """Return the results of all files, each of which a process of its own writes, or the first error."""
    context = multiprocessing.get_context("fork")
    writers: list[Any] = []
    found: dict[int, Any] = {}
    try:
        for number, bucket in enumerate(buckets):
            receiver, sender = context.Pipe(duplex=False)
            with sender:  # then only the writer holds it, and whatever ends the writer ends the pipe
                writers.append((context.Process(target=_write_file, args=(sender, number, bucket, *how)), receiver))
                writers[-1][0].start()
        for number, (writer, receiver) in enumerate(writers):
            try:
                found[number] = receiver.recv()
            except EOFError:
                writer.join()
                name = Path(buckets[number][0]).name
                return ChildProcessError(f"the process that wrote {name} ended by {how_ended(writer.exitcode)}")
    except Exception as error:  # no rank may miss the barrier
        return error
    return next((one for one in found.values() if isinstance(one, Exception)), found)


def _write_file(sender: Any, number: int, bucket: Any, transforms: Any, use_msc: bool) -> None:
    results: queue.Queue[Any] = queue.Queue()
    options = {"use_msc": True} if use_msc else {}
    unused = queue.Queue[int](1)
    unused.put(number)
    filesystem_async.FileSystemWriterAsync.write_preloaded_data(
        transforms, number, bucket, results, unused, True, **options
    )
    sender.send(results.get()[1])


def _num_bytes(contents: dict[str, Any]) -> int:
    """Return the size in bytes of the tensors whose main replica this rank holds."""
    data = [value.data for value in nested_values(contents) if is_main_replica(getattr(value, "replica_id", 1))]
    return sum(tensor.numel() * tensor.element_size() for tensor in data if torch.is_tensor(tensor))
