# Copyright (c) 2026 the megatron_selfdistill authors. Apache-2.0.
"""Read published MXFP4 experts as bf16: 4-bit numbers in blocks of 32 with one power of two each.

A tensor ``name`` [experts, in, out] is stored as ``name_blocks`` [experts, out, in / 32, 16] uint8, with two numbers in
a byte, the lower half first, and ``name_scales`` [experts, out, in / 32] uint8, exponents with the bias 127.

Source: OCP Microscaling Formats (MX) specification 1.0; ``convert_moe_packed_tensors`` of transformers.
"""

from __future__ import annotations

import torch
from torch import Tensor

from megatron_selfdistill.checkpoint.formats.safetensors_directory import Stored, WeightsDirectory
from megatron_selfdistill.errors import CheckpointError

_BLOCKS, _SCALES = "_blocks", "_scales"
_BLOCK = 32
_VALUES = (0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0)
_BYTES = [(low, high) for high in (*_VALUES, *(-v for v in _VALUES)) for low in (*_VALUES, *(-v for v in _VALUES))]


def dequantised(directory: WeightsDirectory) -> WeightsDirectory:
    """Return ``directory`` with a bf16 tensor ``name`` for each pair ``name_blocks`` and ``name_scales``.

    A directory without such pairs is returned itself.

    Raises: CheckpointError for a pair that lacks one of its tensors, or whose types or shapes are not those of MXFP4.
    """
    found = directory.tensors
    names = [name.removesuffix(_BLOCKS) for name in found if name.endswith(_BLOCKS)]
    alone = [name for name in found if name.endswith(_SCALES) and name.removesuffix(_SCALES) not in set(names)]
    if alone:
        raise CheckpointError(f"{alone[0]} in {directory.directory} has no {_BLOCKS} beside it")
    return Mxfp4Directory(directory, names) if names else directory


class Mxfp4Directory:
    """The weights of a Hugging Face directory, some of them stored as MXFP4 and read as bf16."""

    def __init__(self, stored: WeightsDirectory, names: list[str]) -> None:
        """Show the tensors ``names`` of ``stored`` as bf16; the other tensors are as they are."""
        self.directory = stored.directory
        self._stored, self._names = stored, frozenset(names)
        parts = {name + suffix for name in names for suffix in (_BLOCKS, _SCALES)}
        self.tensors = {name: tensor for name, tensor in stored.tensors.items() if name not in parts}
        for name in names:
            self.tensors[name] = self._described(name)

    def read(self, name: str) -> Tensor:
        """Return the tensor ``name``; [experts, in, out] bf16 where MXFP4 stores it."""
        if name not in self._names:
            return self._stored.read(name)
        return dequantise_mxfp4(self._stored.read(name + _BLOCKS), self._stored.read(name + _SCALES))

    def _described(self, name: str) -> Stored:
        found = self._stored.tensors
        if name + _SCALES not in found:
            raise CheckpointError(f"{name}{_BLOCKS} in {self.directory} has no {_SCALES} beside it")
        blocks, scales = found[name + _BLOCKS], found[name + _SCALES]
        fits = len(blocks.shape) == 4 and blocks.shape[3] == _BLOCK // 2 and scales.shape == blocks.shape[:3]
        if not fits or {blocks.dtype, scales.dtype} != {torch.uint8}:
            raise CheckpointError(
                f"{name} is not MXFP4: {_BLOCKS} is {blocks.dtype} {list(blocks.shape)} and {_SCALES} is "
                f"{scales.dtype} {list(scales.shape)}, expected uint8 [experts, out, in / 32, 16] and uint8 "
                "[experts, out, in / 32]"
            )
        experts, rows, groups, _ = blocks.shape
        return Stored(blocks.file, torch.bfloat16, (experts, groups * _BLOCK, rows))


def dequantise_mxfp4(blocks: Tensor, scales: Tensor) -> Tensor:
    """Return the numbers [experts, in, out] in bf16, which holds each of them exactly.

    Shapes: ``blocks`` [experts, out, in / 32, 16] uint8, ``scales`` [experts, out, in / 32] uint8.  A number that is
    too large for bf16 becomes infinite.
    """
    experts, rows, groups, _ = blocks.shape
    result = torch.empty(experts, groups * _BLOCK, rows, dtype=torch.bfloat16)
    table = torch.tensor(_BYTES, dtype=torch.float32)
    for expert in range(experts):  # one expert at a time: indices need eight times the memory of bytes
        numbers = table[blocks[expert].int()].flatten(2)  # [rows, groups, 32]
        numbers = torch.ldexp(numbers, scales[expert].int()[..., None] - 127)
        result[expert] = numbers.flatten(1).t().to(torch.bfloat16)
    return result
