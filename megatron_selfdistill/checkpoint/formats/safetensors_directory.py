# Copyright (c) 2026 the megatron_selfdistill authors. Apache-2.0.
"""Read and write the weights of Hugging Face directories one tensor at a time, in shards of bounded size.

The writers of the libraries need a whole shard in memory.  A file has eight bytes of header length, a JSON header with
the place of each tensor, and the tensors; the writer knows all places before it has the first tensor.

Source: https://github.com/huggingface/safetensors#format
"""

from __future__ import annotations

import json
import math
import os
import struct
import zipfile
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from megatron_selfdistill.checkpoint.formats.hf_files import WeightFiles, weight_files
from megatron_selfdistill.checkpoint.formats.manifest import sync
from megatron_selfdistill.checkpoint.formats.unpickler import load_pickled
from megatron_selfdistill.errors import CheckpointError

_INDEX = "model.safetensors.index.json"
_NAMES = {
    torch.float64: "F64",
    torch.float32: "F32",
    torch.float16: "F16",
    torch.bfloat16: "BF16",
    torch.float8_e4m3fn: "F8_E4M3",
    torch.float8_e5m2: "F8_E5M2",
    torch.float8_e8m0fnu: "F8_E8M0",
    torch.int64: "I64",
    torch.int32: "I32",
    torch.int16: "I16",
    torch.int8: "I8",
    torch.uint8: "U8",
    torch.bool: "BOOL",
}
_DTYPES = {name: dtype for dtype, name in _NAMES.items()}


@dataclass(frozen=True)
class Stored:
    """The file, type and shape of a stored tensor."""

    file: Path
    dtype: torch.dtype
    shape: tuple[int, ...]

    @property
    def num_bytes(self) -> int:
        """The size of the tensor in bytes."""
        return math.prod(self.shape) * self.dtype.itemsize


class WeightsDirectory(Protocol):
    """The weights of a Hugging Face directory."""

    directory: Path
    tensors: dict[str, Stored]
    """The stored tensors by name."""

    def read(self, name: str) -> Tensor:
        """Return the tensor ``name``, mapped from its file where the format allows it."""
        ...


def open_weights_directory(directory: Path) -> WeightsDirectory:
    """Return the weights of a Hugging Face directory, from safetensors or from PyTorch's pickles.

    Raises: CheckpointError for files that are missing or corrupt, or that lead out of the directory.
    """
    files = weight_files(Path(directory))
    return SafetensorsDirectory(directory, files) if files.is_safetensors else PickledDirectory(directory, files)


class SafetensorsDirectory:
    """The weights of a Hugging Face directory in safetensors.

    Raises: CheckpointError for files that are missing or corrupt.
    """

    def __init__(self, directory: Path, files: WeightFiles) -> None:
        self.directory = Path(directory)
        self.tensors: dict[str, Stored] = {}
        for file, names in files.tensors.items():
            try:
                with safe_open(file, framework="pt") as opened:
                    held = set(opened.keys())
                    for name in held if names is None else names & held:
                        part = opened.get_slice(name)
                        dtype = part.get_dtype()
                        if dtype not in _DTYPES:
                            raise CheckpointError(
                                f"{name} in {file} is of type {dtype}, an unknown type: convert the weights"
                            )
                        self.tensors[name] = Stored(file, _DTYPES[dtype], tuple(part.get_shape()))
            except (SafetensorError, OSError) as error:
                raise CheckpointError(f"{file} is corrupt or cut off ({error})") from error
            _require_held(file, names, held, files.index)

    def read(self, name: str) -> Tensor:
        """Return the tensor ``name``, mapped from its file: the system reads a page when the caller touches it."""
        with safe_open(self.tensors[name].file, framework="pt") as opened:
            tensor: Tensor = opened.get_tensor(name)
        return tensor


class PickledDirectory:
    """The weights in ``pytorch_model.bin`` or its shards, from the restricted unpickler, which runs no code."""

    def __init__(self, directory: Path, files: WeightFiles) -> None:
        self.directory = Path(directory)
        self.tensors: dict[str, Stored] = {}
        self._opened: tuple[Path, dict[str, Tensor]] | None = None
        for file, names in files.tensors.items():
            held = self._load(file)
            for name in held if names is None else names & held.keys():
                self.tensors[name] = Stored(file, held[name].dtype, tuple(held[name].shape))
            _require_held(file, names, set(held), files.index)

    def read(self, name: str) -> Tensor:
        """Return the tensor ``name``, mapped from its file; read files of PyTorch before 1.6 completely."""
        return self._load(self.tensors[name].file)[name]

    def _load(self, file: Path) -> dict[str, Tensor]:
        """Return the tensors of one file; keep the last file open."""
        if self._opened is None or self._opened[0] != file:
            self._opened = None
            content = load_pickled(file, mmap=zipfile.is_zipfile(file))
            if not isinstance(content, dict) or not all(map(torch.is_tensor, content.values())):
                raise CheckpointError(f"{file} holds no dict of tensors, expected the format of pytorch_model.bin")
            self._opened = (file, {str(name): tensor.detach() for name, tensor in content.items()})
        return self._opened[1]


def _require_held(file: Path, names: set[str] | None, held: set[str], index: str | None) -> None:
    lost = sorted((names or held) - held)
    if lost:
        raise CheckpointError(f"{file} lacks {lost[0]}, which {index} places there")


class SafetensorsWriter:
    """A writer of safetensors shards of at most ``max_shard_bytes``, which accepts tensors in any order.

    ``tensors``: the (name, dtype, shape) of all tensors, in the order of the shards.

    Raises: CheckpointError, before it writes anything, if one tensor alone is larger than a shard.
    """

    def __init__(
        self, directory: Path, tensors: Sequence[tuple[str, torch.dtype, tuple[int, ...]]], max_shard_bytes: int
    ) -> None:
        self.directory = directory
        self._places: dict[str, tuple[int, int, torch.dtype, tuple[int, ...]]] = {}
        self._files: list[int] = []
        shards = _cut(tensors, max_shard_bytes)
        self._names = [shard_name(number, len(shards)) for number in range(1, len(shards) + 1)]
        self._left: set[str] = set()
        for name, shard in zip(self._names, shards, strict=True):
            self._open(directory / name, shard)
        if len(shards) > 1:
            self._write_index(shards)

    def write(self, name: str, tensor: Tensor) -> None:
        """Write ``tensor`` to its place.

        Raises: CheckpointError if its type or shape is not the announced one; KeyError if ``name`` was written before.
        """
        number, offset, dtype, shape = self._places[name]
        if tensor.dtype != dtype or tuple(tensor.shape) != shape:
            raise CheckpointError(
                f"{name} has the shape {list(tensor.shape)} and type {tensor.dtype}, expected {list(shape)} and "
                f"{dtype}: report this error"
            )
        self._left.remove(name)
        if tensor.numel():
            data = memoryview(tensor.contiguous().reshape(-1).view(torch.uint8).numpy())  # type: ignore[arg-type]
            done = 0
            while done < len(data):  # one system call may write less than the whole view
                done += os.pwrite(self._files[number], data[done:], offset + done)

    def close(self) -> None:
        """Wait until all data is on the disk.

        Raises: CheckpointError if a tensor was not written.
        """
        for descriptor in self._files:
            os.fsync(descriptor)
            os.close(descriptor)
        if self._left:
            raise CheckpointError(
                f"{len(self._left)} tensors were not written, first {min(self._left)}: report this error"
            )

    def _open(self, file: Path, shard: Sequence[tuple[str, torch.dtype, tuple[int, ...]]]) -> None:
        header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
        offset = 0
        # Wider types first, so that every tensor is aligned to its own width.
        for name, dtype, shape in sorted(shard, key=lambda tensor: -tensor[1].itemsize):
            size = math.prod(shape) * dtype.itemsize
            header[name] = {"dtype": _NAMES[dtype], "shape": list(shape), "data_offsets": [offset, offset + size]}
            offset += size
        text = json.dumps(header, separators=(",", ":")).encode()
        text += b" " * (-len(text) % 8)
        start = 8 + len(text)
        for name, dtype, shape in shard:
            self._places[name] = (len(self._files), start + header[name]["data_offsets"][0], dtype, shape)
            self._left.add(name)
        descriptor = os.open(file, os.O_RDWR | os.O_CREAT | os.O_EXCL, 0o666)
        self._files.append(descriptor)
        os.pwrite(descriptor, struct.pack("<Q", len(text)) + text, 0)
        os.ftruncate(descriptor, start + offset)

    def _write_index(self, shards: Sequence[Sequence[tuple[str, torch.dtype, tuple[int, ...]]]]) -> None:
        total = sum(math.prod(shape) * dtype.itemsize for shard in shards for _, dtype, shape in shard)
        weight_map = {tensor[0]: name for name, shard in zip(self._names, shards, strict=True) for tensor in shard}
        index = {"metadata": {"total_size": total}, "weight_map": dict(sorted(weight_map.items()))}
        (self.directory / _INDEX).write_text(json.dumps(index, indent=2) + "\n")
        sync(self.directory / _INDEX)


def shard_name(number: int, count: int) -> str:
    """Return the file name of shard ``number`` of ``count``, counted from 1, as transformers spells it."""
    return "model.safetensors" if count == 1 else f"model-{number:05d}-of-{count:05d}.safetensors"


def _cut(
    tensors: Sequence[tuple[str, torch.dtype, tuple[int, ...]]], max_shard_bytes: int
) -> list[list[tuple[str, torch.dtype, tuple[int, ...]]]]:
    """Return ``tensors`` in order, in shards of at most ``max_shard_bytes``, including headers."""
    shards: list[list[tuple[str, torch.dtype, tuple[int, ...]]]] = [[]]
    filled = 0
    for name, dtype, shape in tensors:
        # The tensor and an upper bound of its header entry: name, type, shape and place.
        size = math.prod(shape) * dtype.itemsize + len(name) + 128
        if size + 64 > max_shard_bytes:
            raise CheckpointError(
                f"{name} alone needs {size + 64:,} bytes, but --max-shard-size is {max_shard_bytes:,}: raise "
                "--max-shard-size"
            )
        if shards[-1] and filled + size + 64 > max_shard_bytes:
            shards.append([])
            filled = 0
        shards[-1].append((name, dtype, shape))
        filled += size
    return shards
