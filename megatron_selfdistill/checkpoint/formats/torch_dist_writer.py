# Copyright (c) 2026 the megatron_selfdistill authors. Apache-2.0.
"""Write a torch_dist checkpoint of Megatron one tensor at a time, from one process without a process group.

    write(path, pieces, common)            # the writer makes each Piece when its turn comes

Memory: one piece, and the next one where the next one is small.
"""

from __future__ import annotations

import io
import math
import os
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import xxhash
from torch import Tensor
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.checkpoint.filesystem import FileSystemWriter, _StorageInfo
from torch.distributed.checkpoint.metadata import (
    BytesStorageMetadata,
    ChunkStorageMetadata,
    Metadata,
    MetadataIndex,
    TensorProperties,
    TensorStorageMetadata,
)
from torch.distributed.checkpoint.planner import SavePlan, SavePlanner, TensorWriteData, WriteItem, WriteItemType
from torch.distributed.checkpoint.state_dict_saver import save
from torch.distributed.checkpoint.storage import WriteResult
from torch.futures import Future

from megatron_selfdistill.checkpoint.formats import manifest
from megatron_selfdistill.checkpoint.formats.manifest import Entry, sync
from megatron_selfdistill.checkpoint.formats.read_ahead import read_ahead
from megatron_selfdistill.errors import CheckpointError

MAX_FILE_BYTES = 4 * 2**30
"""The size at which the writer starts the next .distcp file: ranks share the reading of files of this size."""


@dataclass(frozen=True)
class Piece:
    """A rectangle of a stored tensor, and the function that makes the rectangle."""

    key: str
    shape: tuple[int, ...]
    """The shape of the whole stored tensor."""
    offset: tuple[int, ...]
    """The index of the piece's first element in the stored tensor."""
    sizes: tuple[int, ...]
    """The shape of the piece."""
    dtype: torch.dtype
    make: Callable[[], Tensor]
    """A function that returns the tensor of shape ``sizes`` and type ``dtype``; the writer drops the tensor once it is
    on disk."""

    @property
    def num_bytes(self) -> int:
        """The size of the piece in bytes."""
        return math.prod(self.sizes) * self.dtype.itemsize


def write(
    directory: Path,
    pieces: Sequence[Piece],
    common: dict[str, Any],
    *,
    empty_objects: Sequence[str] = (),
    progress: Callable[[int], None] = lambda _: None,
) -> None:
    """Write a torch_dist checkpoint with the tensors of ``pieces``, and with ``common`` in its common.pt.

    The writer makes the pieces in the given order, one at a time.  ``empty_objects``: keys under which Megatron looks
    for an object and finds None.  ``progress`` receives the number of bytes of each piece.  The writer computes the
    checksums on the way and leaves them in a part of the manifest for `manifest.write`.

    Raises: the exceptions of ``Piece.make``; OSError where the disk is full or not writable.
    """
    directory.mkdir(parents=True, exist_ok=True)
    torch.save(common, directory / "common.pt")
    writer = _SerialWriter(directory, progress)
    try:
        save({}, storage_writer=writer, planner=_PiecePlanner(pieces, empty_objects), no_dist=True)
    except CheckpointException as error:  # wraps the error of each rank; here is one rank
        raise next(iter(error.failures.values()))[0] from None
    (directory / "metadata.json").write_text(
        '{"sharded_backend": "torch_dist", "sharded_backend_version": 1, '
        '"common_backend": "torch", "common_backend_version": 1}'
    )
    manifest.write_part(directory, "0", [], known=writer.checksums)
    for name in ("common.pt", "metadata.json"):
        sync(directory / name)


class _PiecePlanner(SavePlanner):
    """A planner that saves the given pieces, and makes a piece when PyTorch asks for its data."""

    def __init__(self, pieces: Iterable[Piece], empty_objects: Iterable[str]) -> None:
        self.pieces = {MetadataIndex(piece.key, piece.offset): piece for piece in pieces}
        self.empty_objects = list(empty_objects)
        none = io.BytesIO()
        torch.save([None], none)  # Megatron stores a list with one object per shard
        self._none = none.getvalue()

    def set_up_planner(self, state_dict: Any, storage_meta: Any = None, is_coordinator: bool = False) -> None:
        pass

    def create_local_plan(self) -> SavePlan:
        tensors = [_write_item(index, piece) for index, piece in self.pieces.items()]
        return SavePlan(
            [*tensors, *(WriteItem(MetadataIndex(key), WriteItemType.BYTE_IO) for key in self.empty_objects)]
        )

    def create_global_plan(self, all_plans: list[SavePlan]) -> tuple[list[SavePlan], Metadata]:
        stored: dict[str, TensorStorageMetadata] = {}
        for piece in self.pieces.values():
            properties = TensorProperties(dtype=piece.dtype)
            tensor = stored.setdefault(piece.key, TensorStorageMetadata(properties, torch.Size(piece.shape), []))
            tensor.chunks.append(ChunkStorageMetadata(torch.Size(piece.offset), torch.Size(piece.sizes)))
        return all_plans, Metadata({**stored, **{key: BytesStorageMetadata() for key in self.empty_objects}})

    def finish_plan(self, new_plan: SavePlan) -> SavePlan:
        return new_plan

    def resolve_data(self, write_item: WriteItem) -> Tensor | io.BytesIO:
        if write_item.type == WriteItemType.BYTE_IO:
            return io.BytesIO(self._none)
        piece = self.pieces[write_item.index]
        tensor = piece.make()
        if tuple(tensor.shape) != piece.sizes or tensor.dtype != piece.dtype:
            raise CheckpointError(
                f"{piece.key} at {list(piece.offset)} has the shape {list(tensor.shape)} and type "
                f"{tensor.dtype}, expected {list(piece.sizes)} and {piece.dtype}: report this error"
            )
        tensor = tensor.contiguous()
        # torch.save writes the whole storage of a view.
        is_view = tensor.untyped_storage().nbytes() != tensor.numel() * tensor.element_size()
        return tensor.clone() if is_view else tensor


def _write_item(index: MetadataIndex, piece: Piece) -> WriteItem:
    chunk = ChunkStorageMetadata(torch.Size(piece.offset), torch.Size(piece.sizes))
    data = TensorWriteData(chunk, TensorProperties(dtype=piece.dtype), torch.Size(piece.shape))
    return WriteItem(index, WriteItemType.SHARD, tensor_data=data)


class _SerialWriter(FileSystemWriter):
    """A writer that saves tensors in the order of the plan, one at a time.

    PyTorch's own writer keeps one tensor of every key in memory until the file is closed.
    """

    def __init__(self, path: Path, progress: Callable[[int], None]) -> None:
        super().__init__(path)
        self._directory, self._progress = Path(path), progress
        self.checksums: dict[str, Entry] = {}

    def write_data(self, plan: SavePlan, planner: SavePlanner) -> Future[list[WriteResult]]:
        results: list[WriteResult] = []
        stream: _ChecksummedFile | None = None
        tensors = read_ahead(plan.items, planner.resolve_data, _data_bytes)
        for item in plan.items:
            data = next(tensors)  # zip would keep a reference to the tensor
            if stream is None:
                stream = _ChecksummedFile(self._directory / f"__0_{len(self.checksums)}.distcp")
            start = stream.size
            if isinstance(data, io.BytesIO):
                stream.write(data.getbuffer())
            else:
                stream.save(data)
                self._progress(data.numel() * data.element_size())
            place = _StorageInfo(stream.path.name, start, stream.size - start)
            results.append(WriteResult(item.index, place.length, place))
            del data  # before the next one is made
            if stream.size >= MAX_FILE_BYTES or item is plan.items[-1]:
                self.checksums[stream.path.name] = stream.finish()
                stream = None
        done: Future[list[WriteResult]] = Future()
        done.set_result(results)
        return done


def _data_bytes(item: WriteItem) -> int:
    """Return the size in bytes of the tensor of ``item``; 0 for an object."""
    data = item.tensor_data
    return 0 if data is None else data.chunk.sizes.numel() * data.properties.dtype.itemsize


class _ChecksummedFile(io.RawIOBase):
    """A new file that computes its checksum while it is written from front to back."""

    def __init__(self, path: Path) -> None:
        self.path, self.size = path, 0
        self._sum = xxhash.xxh3_128()
        self._file = path.open("xb", buffering=0)
        self._failure: OSError | None = None

    def save(self, tensor: Tensor) -> None:
        """Append ``tensor`` as ``torch.save`` writes it, without the CRC of the zip format.

        Nothing checks that CRC: the manifest has a checksum of the whole file.

        Raises: OSError for a full disk, which ``torch.save`` alone reports as a RuntimeError about its zip file.
        """
        computes_crc = torch.serialization.get_crc32_options()
        torch.serialization.set_crc32_options(False)
        try:
            torch.save(tensor, self)  # type: ignore[arg-type]
        except RuntimeError:
            if self._failure is not None:
                raise self._failure from None
            raise
        finally:
            torch.serialization.set_crc32_options(computes_crc)

    def writable(self) -> bool:
        """Return True: the file accepts data."""
        return True

    def write(self, data: Any) -> int:
        """Append ``data`` and return its size in bytes."""
        view = memoryview(data).cast("B")
        self._sum.update(view)
        done = 0
        try:
            while done < len(view):  # one system call may write less than the whole view
                done += self._file.write(view[done:])
        except OSError as error:
            self._failure = error
            raise
        self.size += done
        return done

    def finish(self) -> Entry:
        """Sync and close the file; return its size and checksum."""
        os.fsync(self._file.fileno())
        self._file.close()
        return Entry(self.size, self._sum.hexdigest())
