# Copyright (c) 2026 the megatron_selfdistill authors. Apache-2.0.
"""Read and write the weights of Hugging Face directories one tensor at a time, in shards of bounded size.

The library writes a shard at once, so a conversion holds the tensors of one shard.  Weights in MXFP4 are read as
bfloat16.
"""

from __future__ import annotations

import json
import re
import zipfile
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from huggingface_hub import split_torch_state_dict_into_shards
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from megatron_selfdistill.checkpoint.formats.manifest import sync
from megatron_selfdistill.checkpoint.formats.unpickler import load_pickled
from megatron_selfdistill.errors import CheckpointError
from megatron_selfdistill.interop.hf_files import weight_files

_INDEX = "model.safetensors.index.json"
_BLOCKS, _SCALES = "_blocks", "_scales"  # the ends of the names of the two tensors of a weight in MXFP4


@dataclass(frozen=True)
class Stored:
    """The file, type and shape of a stored tensor."""

    file: Path
    dtype: torch.dtype
    shape: tuple[int, ...]


def open_weights_directory(directory: Path) -> StoredDirectory:
    """Return the weights of a Hugging Face directory, from safetensors or from PyTorch's pickles.

    Raises: CheckpointError for files that are missing or corrupt, or that lead out of the directory.
    """
    files = weight_files(Path(directory))
    is_safetensors = all(file.suffix == ".safetensors" for file in files)
    return SafetensorsDirectory(files) if is_safetensors else PickledDirectory(files)


class SafetensorsDirectory:
    """The weights of a Hugging Face directory in safetensors.

    Raises: CheckpointError for files that are missing or corrupt.
    """

    def __init__(self, files: Mapping[Path, set[str] | None]) -> None:
        self.tensors: dict[str, Stored] = {}
        for file, names in files.items():
            try:
                with safe_open(file, framework="pt") as opened:
                    held = set(opened.keys())
                    for name in held if names is None else names & held:
                        tensor = opened.get_tensor(name)  # mapped, and read when somebody touches it
                        self.tensors[name] = Stored(file, tensor.dtype, tuple(tensor.shape))
            except (SafetensorError, OSError) as error:
                raise CheckpointError(f"{file} is corrupt or cut off ({error})") from error

    def read(self, name: str) -> Tensor:
        """Return the tensor ``name``, mapped from its file: the system reads a page when the caller touches it."""
        with safe_open(self.tensors[name].file, framework="pt") as opened:
            tensor: Tensor = opened.get_tensor(name)
        return tensor


class PickledDirectory:
    """The weights in ``pytorch_model.bin`` or its shards, from the restricted unpickler, which runs no code."""

    def __init__(self, files: Mapping[Path, set[str] | None]) -> None:
        self.tensors: dict[str, Stored] = {}
        self._opened: tuple[Path, dict[str, Tensor]] | None = None
        for file, names in files.items():
            held = self._load(file)
            for name in held if names is None else names & held.keys():
                self.tensors[name] = Stored(file, held[name].dtype, tuple(held[name].shape))

    def read(self, name: str) -> Tensor:
        """Return the tensor ``name``, mapped from its file; read files of PyTorch before 1.6 completely."""
        return self._load(self.tensors[name].file)[name]

    def _load(self, file: Path) -> dict[str, Tensor]:
        """Return the tensors of one file; keep the last file open."""
        if self._opened is None or self._opened[0] != file:
            self._opened = None
            content = load_pickled(file, mmap=zipfile.is_zipfile(file))
            self._opened = (file, {str(name): tensor.detach() for name, tensor in content.items()})
        return self._opened[1]


class SafetensorsWriter:
    """A writer of safetensors shards of at most ``max_shard_size``, which accepts tensors in any order.

    ``max_shard_size``: the bytes of the tensors, or a text such as 5GB.  ``tensors``: the (name, dtype, shape) of all
    tensors, in the order of the shards.  The writer holds the tensors of a shard until it has all of them, so tensors
    that come in this order need the memory of one shard.  A tensor that is larger than a shard has a shard of its own.
    """

    def __init__(
        self, directory: Path, tensors: Sequence[tuple[str, torch.dtype, tuple[int, ...]]], max_shard_size: str | int
    ) -> None:
        self._directory = directory
        self._held: dict[str, Tensor] = {}
        described = {name: torch.empty(shape, dtype=dtype, device="meta") for name, dtype, shape in tensors}
        split = split_torch_state_dict_into_shards(
            described, filename_pattern="model{suffix}.safetensors", max_shard_size=max_shard_size
        )
        self._left = {file: set(names) for file, names in split.filename_to_tensors.items()}
        self._files = {name: file for file, names in split.filename_to_tensors.items() for name in names}
        if split.is_sharded:
            index = {"metadata": split.metadata, "weight_map": dict(sorted(split.tensor_to_filename.items()))}
            (directory / _INDEX).write_text(json.dumps(index, indent=2) + "\n")
            sync(directory / _INDEX)

    def write(self, name: str, tensor: Tensor) -> None:
        """Hold ``tensor``, and write its shard if it is the last tensor of the shard.

        Raises: KeyError if ``name`` was given before; OSError where the disk does not take the shard.
        """
        file = self._files[name]
        self._held[name] = tensor.contiguous()
        self._left[file].remove(name)
        if not self._left[file]:
            held = {other: self._held.pop(other) for other in list(self._held) if self._files[other] == file}
            _save_shard(self._directory / file, held)

    def close(self) -> None:
        """Raise CheckpointError if a tensor was not written."""
        if left := {name for names in self._left.values() for name in names}:
            raise CheckpointError(f"{len(left)} tensors were not written, first {min(left)}: report this error")


def _save_shard(file: Path, tensors: dict[str, Tensor]) -> None:
    """Write one shard to the disk, with the permissions of a new file.

    Raises: OSError where the disk does not take the shard.
    """
    file.touch(exist_ok=False)
    permissions = file.stat().st_mode
    try:
        save_file(tensors, file, metadata={"format": "pt"})
    except SafetensorError as error:
        number = re.search(r"os error (\d+)", str(error))
        raise OSError(int(number[1]) if number else None, str(error), str(file)) from error
    file.chmod(permissions)  # the library gives a file to its owner alone
    sync(file)


def dequantised(directory: StoredDirectory) -> WeightsDirectory:
    """Return ``directory`` with a bf16 tensor ``name`` for each pair ``name_blocks`` and ``name_scales``.

    A directory without such pairs is returned itself.
    """
    names = [name.removesuffix(_BLOCKS) for name in directory.tensors if name.endswith(_BLOCKS)]
    return Mxfp4Directory(directory, names) if names else directory


class Mxfp4Directory:
    """The weights of a Hugging Face directory, some of them stored as MXFP4 and read as bf16."""

    def __init__(self, stored: StoredDirectory, names: list[str]) -> None:
        """Show the tensors ``names`` of ``stored`` as bf16; the other tensors are as they are."""
        self._stored, self._names = stored, frozenset(names)
        parts = {name + suffix for name in names for suffix in (_BLOCKS, _SCALES)}
        self.tensors = {name: tensor for name, tensor in stored.tensors.items() if name not in parts}
        for name in names:
            blocks = stored.tensors[name + _BLOCKS]  # [experts, out, in / 32, 16] uint8
            experts, rows, groups, half_block = blocks.shape
            self.tensors[name] = Stored(blocks.file, torch.bfloat16, (experts, groups * 2 * half_block, rows))

    def read(self, name: str) -> Tensor:
        """Return the tensor ``name``; [experts, in, out] bf16 where MXFP4 stores it."""
        if name not in self._names:
            return self._stored.read(name)
        from transformers.integrations.mxfp4 import convert_moe_packed_tensors  # seconds

        blocks, scales = self._stored.read(name + _BLOCKS), self._stored.read(name + _SCALES)
        whole: Tensor = convert_moe_packed_tensors(blocks, scales, rows_per_chunk=2**20)
        return whole.cpu()


StoredDirectory = SafetensorsDirectory | PickledDirectory
WeightsDirectory = StoredDirectory | Mxfp4Directory
"""The weights of a Hugging Face directory; ``tensors`` has the stored tensors by name, and ``read`` returns one."""
