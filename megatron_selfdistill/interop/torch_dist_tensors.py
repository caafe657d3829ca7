# Copyright (c) 2026 the megatron_selfdistill authors. Apache-2.0.
"""Read and write the tensors of torch_dist checkpoints in one process without a process group.

    reader = TorchDistReader(path)
    reader.read_at(("decoder.layers.mlp.linear_fc2.weight", (17,)), ())
    write(path, pieces, common)            # the writer makes each Piece when its turn comes

Memory of a reader: one slice, and one stored chunk where the chunks of the checkpoint are larger than the slice.
Memory of the writer: one piece.
"""

from __future__ import annotations

import functools
import io
import json
import math
import os
from collections import Counter, deque
from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import xxhash
from torch import Tensor
from torch.distributed.checkpoint.filesystem import FileSystemWriter, _StorageInfo
from torch.distributed.checkpoint.metadata import (
    BytesStorageMetadata,
    ChunkStorageMetadata,
    Metadata,
    MetadataIndex,
    TensorProperties,
    TensorStorageMetadata,
)
from torch.distributed.checkpoint.storage import WriteResult
from torch.distributed.checkpoint.utils import _create_file_view

from megatron_selfdistill.checkpoint.formats import manifest
from megatron_selfdistill.checkpoint.formats.manifest import Entry, sync
from megatron_selfdistill.checkpoint.formats.model_tensors import Place, places, shown, weight_shapes
from megatron_selfdistill.checkpoint.formats.torch_dist import COMMON_STATE, WRITTEN_WITH, read_common
from megatron_selfdistill.checkpoint.formats.unpickler import load_metadata
from megatron_selfdistill.compat import older_megatron
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
    """Write a torch_dist checkpoint with the tensors of ``pieces`` and the state ``common``, which is no tensor.

    ``common`` goes where the installed Megatron Core stores such state (`read_common`).
    The writer makes the pieces in the given order, one at a time: PyTorch's own writer keeps one tensor of every key in
    memory until the file is closed.  ``empty_objects``: keys under which Megatron looks for an object and finds None.
    ``progress`` receives the number of bytes of each piece.  The writer computes the checksums on the way and leaves
    them in a part of the manifest for `manifest.write`.

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
    stored: dict[str, Any] = {key: BytesStorageMetadata() for key in objects}
    left: deque[tuple[MetadataIndex, Callable[[], Any], int]] = deque()
    for piece in pieces:
        properties, shape = TensorProperties(dtype=piece.dtype), torch.Size(piece.shape)
        tensor = stored.setdefault(piece.key, TensorStorageMetadata(properties, shape, []))
        tensor.chunks.append(ChunkStorageMetadata(torch.Size(piece.offset), torch.Size(piece.sizes)))
        left.append((MetadataIndex(piece.key, piece.offset), functools.partial(_made, piece), piece.num_bytes))
    for key, value in objects.items():  # Megatron stores a list with one object per shard
        left.append((MetadataIndex(key), functools.partial(list, [value]), 0))
    results: list[WriteResult] = []
    checksums: dict[str, Entry] = {}
    while left:
        name = f"__0_{len(checksums)}.distcp"
        with _ChecksummedFile(directory / name) as stream:
            while left and stream.tell() < MAX_FILE_BYTES:
                (index, make, num_bytes), start = left.popleft(), stream.tell()
                _save(make(), stream)
                place = _StorageInfo(name, start, stream.tell() - start)
                results.append(WriteResult(index, place.length, place))
                progress(num_bytes)
            stream.flush()
            os.fsync(stream.fileno())
            checksums[name] = Entry(stream.tell(), stream.checksum.hexdigest())
    FileSystemWriter(directory).finish(Metadata(stored), [results])
    (directory / "metadata.json").write_text(json.dumps(description))
    manifest.write_part(directory, "0", [], known=checksums)
    for file in (directory / "metadata.json", *directory.glob("common.pt")):
        sync(file)


def _made(piece: Piece) -> Tensor:
    tensor = piece.make().contiguous()
    if tuple(tensor.shape) != piece.sizes or tensor.dtype != piece.dtype:
        raise CheckpointError(
            f"{piece.key} is {list(tensor.shape)} {tensor.dtype}, not {list(piece.sizes)} {piece.dtype}"
        )
    # torch.save writes the whole storage of a view.
    return tensor.clone() if tensor.untyped_storage().nbytes() != tensor.nbytes else tensor


class _ChecksummedFile(io.BufferedWriter):
    """A new file that computes its checksum while it is written from front to back."""

    def __init__(self, path: Path) -> None:
        super().__init__(io.FileIO(path, "xb"))
        self.checksum = xxhash.xxh3_128()

    def write(self, data: Any) -> int:
        self.checksum.update(data)
        return super().write(data)


def _save(value: Any, stream: io.BufferedWriter) -> None:
    try:
        torch.save(value, stream)
    except RuntimeError as error:  # on a full disk PyTorch complains of its position, after the error of the system
        raise (error.__context__ if isinstance(error.__context__, OSError) else error) from None


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
        self._bounds: dict[str, tuple[Tensor, Tensor]] = {}
        self._kept: tuple[MetadataIndex, Tensor] | None = None

    @property
    def common(self) -> dict[str, Any]:
        """The state that is no tensor (`read_common`)."""
        return read_common(self.directory, self._metadata)

    def place(self, key: str, index: tuple[int, ...]) -> Place | None:
        """Return the place of a tensor in this checkpoint, under any of its names; None if the tensor is missing."""
        return next((place for place in places(key, index) if place[0] in self.shapes), None)

    def full_shape(self, place: Place, expected: tuple[int, ...]) -> tuple[int, ...]:
        """Return the shape of the tensor at ``place``, which does not depend on ``expected`` here."""
        return self.shapes[place[0]][len(place[1]) :]

    def dtype_at(self, place: Place) -> torch.dtype:
        """Return the type of the tensor at ``place``."""
        return self._tensors[place[0]].properties.dtype

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

    def read_at(self, place: Place, expected: tuple[int, ...], num_rows: int | None = None) -> Tensor:
        """Return the tensor at ``place``, or its first ``num_rows`` rows; nothing depends on ``expected`` here."""
        (key, index), shape = place, self.full_shape(place, expected)
        sizes = shape if num_rows is None else (num_rows, *shape[1:])
        start, end = (*index, *(0 for _ in sizes)), (*(i + 1 for i in index), *sizes)
        target: Tensor | None = None
        covered = 0
        for chunk in self._overlapping(key, start, end):
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

    def _overlapping(self, key: str, start: Sequence[int], end: Sequence[int]) -> list[ChunkStorageMetadata]:
        """Return the chunks of ``key`` that overlap the rectangle from ``start`` to ``end`` (exclusive)."""
        chunks = self._tensors[key].chunks
        if key not in self._bounds:  # a key may have one chunk for each expert of each layer
            offsets, sizes = (torch.tensor(rows) for rows in ([c.offsets for c in chunks], [c.sizes for c in chunks]))
            self._bounds[key] = offsets, offsets + sizes
        first, last = self._bounds[key]
        inside = ((first < torch.tensor(end)) & (last > torch.tensor(start))).all(1)
        return [chunks[i] for i in inside.nonzero().flatten().tolist()]

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
