# Copyright (c) 2026 the megatron_selfdistill authors. Apache-2.0.
"""Read and write the tensors of torch_dist checkpoints in one process without a process group.

    reader = TorchDistReader(path)
    reader.read("decoder.layers.mlp.linear_fc2.weight", (17,))
    write(path, pieces, common)            # the writer makes each Piece when its turn comes

Memory of a reader: one slice, and one stored chunk where the chunks of the checkpoint are larger than the slice.
Memory of the writer: one piece, and the next one where the next one is small.
"""

from __future__ import annotations

import concurrent.futures
import io
import json
import math
import os
from collections import Counter, defaultdict
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

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
from torch.distributed.checkpoint.utils import _create_file_view
from torch.futures import Future

from megatron_selfdistill.checkpoint.formats import manifest
from megatron_selfdistill.checkpoint.formats.manifest import Entry, sync
from megatron_selfdistill.checkpoint.formats.model_tensors import weight_shapes
from megatron_selfdistill.checkpoint.formats.tensor_names import Place, places, shown
from megatron_selfdistill.checkpoint.formats.torch_dist import COMMON_STATE, WRITTEN_WITH, read_common
from megatron_selfdistill.checkpoint.formats.unpickler import load_metadata
from megatron_selfdistill.compat import older_megatron
from megatron_selfdistill.errors import CheckpointError

MAX_FILE_BYTES = 4 * 2**30
"""The size at which the writer starts the next .distcp file: ranks share the reading of files of this size."""
T = TypeVar("T")
R = TypeVar("R")


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
    """Write a torch_dist checkpoint with the tensors of ``pieces`` and the state ``common``, which is no tensor.

    ``common`` goes where the installed Megatron Core stores such state (`read_common`).
    The writer makes the pieces in the given order, one at a time.  ``empty_objects``: keys under which Megatron looks
    for an object and finds None.  ``progress`` receives the number of bytes of each piece.  The writer computes the
    checksums on the way and leaves them in a part of the manifest for `manifest.write`.

    Raises: the exceptions of ``Piece.make``; OSError where the disk is full or not writable.
    """
    directory.mkdir(parents=True, exist_ok=True)
    description: dict[str, Any] = {"sharded_backend": "torch_dist", "sharded_backend_version": 1}
    objects: dict[str, Any] = dict.fromkeys(empty_objects)
    common = {**common, WRITTEN_WITH: older_megatron.version_text()}
    if older_megatron.stores_common_file():
        description |= {"common_backend": "torch", "common_backend_version": 1}
        torch.save(common, directory / "common.pt")
    else:
        objects[COMMON_STATE] = common
    writer = _SerialWriter(directory, progress)
    try:
        save({}, storage_writer=writer, planner=_PiecePlanner(pieces, objects), no_dist=True)
    except CheckpointException as error:  # wraps the error of each rank; here is one rank
        raise next(iter(error.failures.values()))[0] from None
    (directory / "metadata.json").write_text(json.dumps(description))
    manifest.write_part(directory, "0", [], known=writer.checksums)
    for file in (directory / "metadata.json", *directory.glob("common.pt")):
        sync(file)


class _PiecePlanner(SavePlanner):
    """A planner that saves the given pieces, and makes a piece when PyTorch asks for its data."""

    def __init__(self, pieces: Iterable[Piece], objects: Mapping[str, Any]) -> None:
        self.pieces = {MetadataIndex(piece.key, piece.offset): piece for piece in pieces}
        self.objects = objects

    def set_up_planner(self, state_dict: Any, storage_meta: Any = None, is_coordinator: bool = False) -> None:
        pass

    def create_local_plan(self) -> SavePlan:
        tensors = [_write_item(index, piece) for index, piece in self.pieces.items()]
        return SavePlan([*tensors, *(WriteItem(MetadataIndex(key), WriteItemType.BYTE_IO) for key in self.objects)])

    def create_global_plan(self, all_plans: list[SavePlan]) -> tuple[list[SavePlan], Metadata]:
        stored: dict[str, TensorStorageMetadata] = {}
        for piece in self.pieces.values():
            properties = TensorProperties(dtype=piece.dtype)
            tensor = stored.setdefault(piece.key, TensorStorageMetadata(properties, torch.Size(piece.shape), []))
            tensor.chunks.append(ChunkStorageMetadata(torch.Size(piece.offset), torch.Size(piece.sizes)))
        return all_plans, Metadata({**stored, **{key: BytesStorageMetadata() for key in self.objects}})

    def finish_plan(self, new_plan: SavePlan) -> SavePlan:
        return new_plan

    def resolve_data(self, write_item: WriteItem) -> Tensor | io.BytesIO:
        if write_item.type == WriteItemType.BYTE_IO:
            data = io.BytesIO()
            torch.save([self.objects[write_item.index.fqn]], data)  # Megatron stores a list with one object per shard
            return data
        piece = self.pieces[write_item.index]
        tensor = piece.make().contiguous()
        if tuple(tensor.shape) != piece.sizes or tensor.dtype != piece.dtype:
            raise CheckpointError(
                f"{piece.key} at {list(piece.offset)} has the shape {list(tensor.shape)} and type "
                f"{tensor.dtype}, expected {list(piece.sizes)} and {piece.dtype}: report this error"
            )
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


def read_ahead(items: Sequence[T], make: Callable[[T], R], num_bytes: Callable[[T], int]) -> Iterator[R]:
    """Yield ``make(item)`` of each item in order; another thread makes the results one after the other.

    The thread makes the next result while the caller uses the present result, if memory allows: ``num_bytes`` of the
    present result, plus twice that of the next result (its inputs and itself), is at most twice the largest
    ``num_bytes``.  Else the thread starts when the caller, which must have dropped the present result, asks for the
    next result.  The function raises the exceptions of ``make``.
    """
    room = 2 * max(map(num_bytes, items), default=0)
    ahead: concurrent.futures.Future[R] | None = None
    with ThreadPoolExecutor(1, thread_name_prefix="read ahead") as pool:
        for item, following in zip(items, [*items[1:], None], strict=True):
            made = [(ahead or pool.submit(make, item)).result()]
            ahead = None
            if following is not None and num_bytes(item) + 2 * num_bytes(following) <= room:
                ahead = pool.submit(make, following)
            yield made.pop()  # no reference stays here


class TorchDistReader:
    """The weights of a torch_dist checkpoint, which it reads slice by slice.

    Its methods raise CheckpointError for missing or corrupt files.
    """

    def __init__(self, directory: Path) -> None:
        self.directory = Path(directory)
        self._metadata = load_metadata(self.directory)
        found = self._metadata.state_dict_metadata
        self._tensors = {key: t for key, t in found.items() if isinstance(t, TensorStorageMetadata)}
        self.shapes = {key: tuple(t.size) for key, t in self._tensors.items()}
        self._chunks: dict[str, _ChunkTable] = {}
        self._kept: tuple[MetadataIndex, Tensor] | None = None

    @property
    def common(self) -> dict[str, Any]:
        """The state that is no tensor (`read_common`)."""
        return read_common(self.directory, self._metadata)

    @property
    def objects(self) -> list[str]:
        """The keys of the stored objects that are no tensors."""
        return [key for key in self._metadata.state_dict_metadata if key not in self._tensors]

    def place(self, key: str, index: tuple[int, ...]) -> Place | None:
        """Return the place of a tensor in this checkpoint, under any of its names; None if the tensor is missing."""
        return next((place for place in places(key, index) if place[0] in self.shapes), None)

    def full_shape(self, place: Place, expected: tuple[int, ...]) -> tuple[int, ...]:
        """Return the shape of the tensor at ``place``, which does not depend on ``expected`` here."""
        return self.shapes[place[0]][len(place[1]) :]

    def dtype_at(self, place: Place) -> torch.dtype:
        """Return the type of the tensor at ``place``."""
        return self._tensors[place[0]].properties.dtype

    def read_at(self, place: Place, expected: tuple[int, ...], num_rows: int | None = None) -> Tensor:
        """Return the tensor at ``place``, or its first ``num_rows`` rows; see `read`."""
        return self.read(place[0], place[1], num_rows)

    def sizes(self) -> dict[torch.dtype, int]:
        """Return the number of elements of the model's tensors by type, including padding."""
        sizes: Counter[torch.dtype] = Counter()
        for key, shape in weight_shapes(self.shapes).items():
            sizes[self.dtype_at((key, ()))] += math.prod(shape)
        return sizes

    def unused(self, used: Collection[Place]) -> list[str]:
        """Return a fault for each tensor of the model that has no place in ``used``, or some of whose places lack."""
        counts, depths = Counter(key for key, _ in used), {key: len(index) for key, index in used}
        faults = []
        for key, shape in weight_shapes(self.shapes).items():
            if key not in counts:
                faults.append(f"{key} is unexpected")
            elif (count := math.prod(shape[: depths[key]])) != counts[key]:
                faults.append(f"{key} holds {count} tensors, expected {counts[key]}")
        return faults

    def read(self, key: str, index: tuple[int, ...] = (), num_rows: int | None = None) -> Tensor:
        """Return ``stored[key][index]``, or its first ``num_rows`` rows."""
        shape = self.shapes[key][len(index) :]
        sizes = shape if num_rows is None else (num_rows, *shape[1:])
        start, end = (*index, *(0 for _ in sizes)), (*(i + 1 for i in index), *sizes)
        target: Tensor | None = None
        covered = 0
        for chunk in self._table(key).overlapping(start, end):
            low = [max(a, b) for a, b in zip(start, chunk.offsets, strict=True)]
            high = [min(a, b + s) for a, b, s in zip(end, chunk.offsets, chunk.sizes, strict=True)]
            inside = tuple(slice(a - o, b - o) for a, b, o in zip(low, high, chunk.offsets, strict=True))
            part = self._load(key, chunk)[inside]
            if target is None and part.numel() == math.prod(sizes):
                return part.reshape(sizes)
            if target is None:
                target = torch.empty([b - a for a, b in zip(start, end, strict=True)], dtype=part.dtype)
            target[tuple(slice(a - s, b - s) for a, b, s in zip(low, high, start, strict=True))] = part
            covered += part.numel()
            del part
        if target is None or covered != target.numel():
            raise CheckpointError(f"{self.directory} holds only parts of {shown(key, index)}: save it again")
        return target.reshape(sizes)

    def _table(self, key: str) -> _ChunkTable:
        if key not in self._chunks:
            self._chunks[key] = _ChunkTable(self._tensors[key].chunks)
        return self._chunks[key]

    def _load(self, key: str, chunk: ChunkStorageMetadata) -> Tensor:
        """Return one whole chunk; keep the last chunk if it holds several layers or experts."""
        index = MetadataIndex(key, chunk.offsets)
        if self._kept is not None and self._kept[0] == index:
            return self._kept[1]
        self._kept = None  # frees the memory before the next chunk needs it
        place = self._metadata.storage_data[index]
        try:
            with (self.directory / place.relative_path).open("rb", buffering=0) as file:
                window: Any = _create_file_view(file, place.offset, place.length)
                tensor: Tensor = torch.load(window, map_location="cpu", weights_only=True)
        except Exception as error:
            name = place.relative_path
            raise CheckpointError(
                f"{self.directory} has a corrupt {name}: no tensor of {key} at byte {place.offset:,} "
                f"({type(error).__name__}: {error})"
            ) from error
        if tuple(tensor.shape) != tuple(chunk.sizes):
            tensor = tensor.reshape(chunk.sizes)
        if max(chunk.sizes[:-2], default=1) > 1:  # the caller reads its layers or experts in turn
            self._kept = (index, tensor)
        return tensor


class _ChunkTable:
    """The chunks of one key by their leading index: a key may have one chunk for each expert of each layer."""

    def __init__(self, chunks: Sequence[ChunkStorageMetadata]) -> None:
        self._by_first: dict[tuple[int, ...], list[ChunkStorageMetadata]] = defaultdict(list)
        self._wide: list[ChunkStorageMetadata] = []
        self._depth = max(len(chunks[0].sizes) - 2, 0) if chunks else 0
        for chunk in chunks:
            if all(size == 1 for size in chunk.sizes[: self._depth]):
                self._by_first[tuple(chunk.offsets[: self._depth])].append(chunk)
            else:
                self._wide.append(chunk)

    def overlapping(self, start: Sequence[int], end: Sequence[int]) -> list[ChunkStorageMetadata]:
        """Return the chunks that overlap the rectangle from ``start`` to ``end`` (exclusive)."""
        narrow = all(b - a == 1 for a, b in zip(start[: self._depth], end[: self._depth], strict=True))
        if narrow:
            near = [*self._by_first.get(tuple(start[: self._depth]), []), *self._wide]
        else:
            near = [*(chunk for chunks in self._by_first.values() for chunk in chunks), *self._wide]
        return [
            chunk
            for chunk in near
            if all(o < b and a < o + s for a, b, o, s in zip(start, end, chunk.offsets, chunk.sizes, strict=True))
        ]
