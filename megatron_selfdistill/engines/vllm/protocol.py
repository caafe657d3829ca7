# Copyright (c) 2026 the megatron_selfdistill authors. Apache-2.0.
"""The protocol of weight transfer: how a bucket of weights is laid out, and how a receiver knows that it is complete.

The trainer (transfer.py) and a vLLM server (plugin/receivers.py, server/serve.py) share this module, which needs torch
only.
"""

from __future__ import annotations

import contextlib
import hashlib
import logging
import math
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

logger = logging.getLogger(__name__)

_ALIGNMENT = 16  # bytes: a tensor of any dtype may begin there


@dataclass(frozen=True)
class Layout:
    """The contents of a bucket: tensors one after the other, each at the next multiple of 16 bytes."""

    names: list[str]
    """Hugging Face names of the tensors."""
    dtypes: list[str]
    """Names of the dtypes: ``bfloat16`` for ``torch.bfloat16``."""
    shapes: list[list[int]]
    """Shapes of the tensors."""

    @property
    def sizes(self) -> list[int]:
        """Bytes of each tensor, without padding."""
        sizes = zip(self.shapes, self.dtypes, strict=True)
        return [math.prod(shape) * _dtype(name).itemsize for shape, name in sizes]

    @property
    def num_bytes(self) -> int:
        """Bytes of the bucket, padding included."""
        return sum(map(_aligned, self.sizes))


def layout_of(tensors: Sequence[tuple[str, Tensor]]) -> Layout:
    """Return the layout of a bucket with these (Hugging Face name, full tensor)."""
    return Layout(
        names=[name for name, _ in tensors],
        dtypes=[str(tensor.dtype).removeprefix("torch.") for _, tensor in tensors],
        shapes=[list(tensor.shape) for _, tensor in tensors],
    )


@torch.no_grad()
def pack(tensors: Sequence[tuple[str, Tensor]], layout: Layout, into: Tensor | None = None) -> Tensor:
    """Return the bucket ``[num_bytes]`` uint8 with these tensors, each copied once.

    ``into`` is memory of at least that many bytes, whose beginning becomes the bucket; None takes new memory on the
    tensors' device.  From a GPU to main memory the bytes go in one copy, and the function returns when the copy is
    done.
    """
    device = tensors[0][1].device
    if into is None or into.device != device:
        packed = torch.empty(layout.num_bytes, dtype=torch.uint8, device=device)
    else:
        packed = into[: layout.num_bytes]
    for (_, source), (_, place) in zip(tensors, unpack(packed, layout), strict=True):
        place.copy_(source)
    return packed if into is None or into.device == device else into[: layout.num_bytes].copy_(packed)


def unpack(packed: Tensor, layout: Layout) -> list[tuple[str, Tensor]]:
    """Return the (name, tensor) of a bucket, as views of the bucket."""
    tensors = []
    start = 0
    for name, dtype, shape, size in zip(layout.names, layout.dtypes, layout.shapes, layout.sizes, strict=True):
        tensors.append((name, packed[start : start + size].view(_dtype(dtype)).view(shape)))
        start += _aligned(size)
    return tensors


def pin(memory: Tensor) -> Callable[[], None]:
    """Register main memory with the GPU's driver for direct copies, and return a function that undoes the registration.

    Call that function before the memory is freed.  Nothing happens in a process without a GPU.  Where the driver
    refuses, the log says so, and copies go through a staging buffer.
    """
    if not torch.cuda.is_available():
        return lambda: None
    cudart: Any = torch.cuda.cudart()
    address = memory.data_ptr()
    status = int(cudart.cudaHostRegister(address, memory.nbytes, 0))
    if status != 0:
        with contextlib.suppress(RuntimeError):  # the next kernel of this thread would raise the error
            torch.zeros(1, device="cuda")
        logger.warning("CUDA cannot pin %d MiB of a bucket (error %d): copies are slower", memory.nbytes >> 20, status)
        return lambda: None
    return lambda: cudart.cudaHostUnregister(address)


def digest(names: Iterable[str]) -> str:
    """Return a hash of a collection of names, in any order; a name that comes twice counts twice."""
    return hashlib.blake2b("\0".join(sorted(names)).encode(), digest_size=16).hexdigest()


def boot_id() -> str:
    """Return the id of the running kernel: the same in all containers of a host, different on every other host."""
    return Path("/proc/sys/kernel/random/boot_id").read_text().strip()


def nccl_version() -> str | None:
    """Return the version of the NCCL library that torch uses in this process, such as "2.27.5"; None without a GPU."""
    if not torch.cuda.is_available():
        return None
    return ".".join(map(str, torch.cuda.nccl.version()))


def own_gpu() -> str | None:
    """Return the UUID of the GPU that this process computes on; None without a GPU."""
    if not torch.cuda.is_available():
        return None
    return str(torch.cuda.get_device_properties(torch.cuda.current_device()).uuid)


def _aligned(num_bytes: int) -> int:
    return math.ceil(num_bytes / _ALIGNMENT) * _ALIGNMENT


def _dtype(name: str) -> torch.dtype:
    dtype: torch.dtype = getattr(torch, name)
    return dtype
