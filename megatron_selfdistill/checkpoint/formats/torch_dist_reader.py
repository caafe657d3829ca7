# Copyright (c) 2026 the megatron_selfdistill authors. Apache-2.0.
"""Read a torch_dist checkpoint of Megatron slice by slice, in one process without a process group.

    reader = TorchDistReader(path)
    reader.read("decoder.layers.mlp.linear_fc2.weight", (17,))

Memory: one slice, and one stored chunk where the chunks of the checkpoint are larger than the slice.
"""

from __future__ import annotations

import contextlib
import errno
import io
import math
import mmap
import sys
from collections import defaultdict
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.distributed.checkpoint.metadata import ChunkStorageMetadata, MetadataIndex, TensorStorageMetadata

from megatron_selfdistill.checkpoint.formats.tensor_names import shown
from megatron_selfdistill.checkpoint.formats.unpickler import load_metadata, load_pickled
from megatron_selfdistill.errors import CheckpointError

_POPULATE_READ = 22
"""Linux's MADV_POPULATE_READ: read all pages now, and report an error of the disk instead of a SIGBUS later."""


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
        """The contents of common.pt, from the restricted unpickler."""
        common: dict[str, Any] = load_pickled(self.directory / "common.pt")
        return common

    @property
    def objects(self) -> list[str]:
        """The keys of the stored objects that are no tensors."""
        return [key for key in self._metadata.state_dict_metadata if key not in self._tensors]

    def dtype(self, key: str) -> torch.dtype:
        """Return the type of the tensor that is stored under ``key``."""
        return self._tensors[key].properties.dtype

    def read(self, key: str, index: tuple[int, ...] = (), num_rows: int | None = None) -> Tensor:
        """Return ``stored[key][index]``, or its first ``num_rows`` rows; the tensor may be mapped from the file."""
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
                target = _in_large_pages([b - a for a, b in zip(start, end, strict=True)], part.dtype)
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
            tensor = _mapped(self.directory / place.relative_path, place.offset, place.length)
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


def _in_large_pages(shape: Sequence[int], dtype: torch.dtype) -> Tensor:
    """Return an uninitialised tensor, in pages of 2 MiB where the system has them.

    The allocation of small pages would cost more time than the copy into the pages.
    """
    num_bytes = math.prod(shape) * dtype.itemsize
    if not num_bytes or not hasattr(mmap, "MADV_HUGEPAGE"):
        return torch.empty(shape, dtype=dtype)
    memory = mmap.mmap(-1, num_bytes, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    with contextlib.suppress(OSError):  # a kernel without large pages
        memory.madvise(mmap.MADV_HUGEPAGE)
    return torch.frombuffer(memory, dtype=dtype).view(shape)


def _mapped(path: Path, offset: int, length: int) -> Tensor:
    """Return the tensor that ``torch.save`` wrote to ``length`` bytes of a file, mapped from the file.

    The function reads all pages of the mapping: a copy into new memory would cost more than the reading.

    Raises: OSError where the file ends too early or cannot be read; the exceptions of ``torch.load`` where the bytes
    are not a file of ``torch.save``.
    """
    with _Window(path, offset, length) as window:
        with torch.serialization.skip_data():  # the layout of the tensor, in memory that is never touched
            tensor: Tensor = torch.load(window, map_location="cpu", weights_only=True)  # type: ignore[arg-type]
        num_bytes = tensor.untyped_storage().nbytes()
        if not num_bytes:
            return tensor
        window.seek(0)
        archive = torch._C.PyTorchFileReader(window)  # type: ignore[call-overload]
        if archive.has_record("byteorder") and archive.get_record("byteorder") != sys.byteorder.encode():
            raise ValueError(f"expected numbers of byte order {sys.byteorder}")
        start = offset + archive.get_record_offset("data/0")
    before = start % mmap.ALLOCATIONGRANULARITY
    with path.open("rb") as file:
        if start + num_bytes > offset + length:
            raise OSError(f"expected {num_bytes:,} bytes at {start:,}, got {offset + length - start:,}")
        pages = mmap.mmap(file.fileno(), before + num_bytes, access=mmap.ACCESS_COPY, offset=start - before)
    try:
        pages.madvise(_POPULATE_READ)
    except OSError as error:
        if error.errno != errno.EINVAL:  # Linux before 5.14 lacks the advice, and reads page by page
            raise
    stored = torch.frombuffer(memoryview(pages)[before:], dtype=torch.uint8).view(tensor.dtype)
    return stored.as_strided(tensor.shape, tensor.stride(), tensor.storage_offset())


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


class _Window(io.RawIOBase):
    """A range of bytes of a file as a file of its own, which reads straight into the caller's memory."""

    def __init__(self, path: Path, offset: int, length: int) -> None:
        self._file = path.open("rb", buffering=0)
        self._offset, self._length, self._position = offset, length, 0

    def readable(self) -> bool:
        """Return True: the file can be read."""
        return True

    def seekable(self) -> bool:
        """Return True: the position can be set."""
        return True

    def seek(self, position: int, whence: int = io.SEEK_SET) -> int:
        """Set the position within the range, and return it."""
        self._position = position + {io.SEEK_SET: 0, io.SEEK_CUR: self._position, io.SEEK_END: self._length}[whence]
        return self._position

    def tell(self) -> int:
        """Return the position within the range."""
        return self._position

    def readinto(self, buffer: Any) -> int:
        """Fill ``buffer`` from the position on, up to the end of the range; return the number of bytes."""
        view = memoryview(buffer).cast("B")[: max(self._length - self._position, 0)]
        self._file.seek(self._offset + self._position)
        count = self._file.readinto(view) or 0
        self._position += count
        return count

    def close(self) -> None:
        """Close the underlying file."""
        self._file.close()
        super().close()
