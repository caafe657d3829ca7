# Copyright (c) 2026 the megatron_selfdistill authors. Apache-2.0.
"""What the trainer (transfer.py) and a vLLM server (vllm_plugin/receivers.py, serve.py) must agree on: how a bucket of
weights is laid out, how completeness is told, the process group of a broadcast, names.  Needs torch only."""

from __future__ import annotations

import ctypes
import datetime
import hashlib
import json
import math
import socket
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

TOKEN_VARIABLE = "SELFDISTILL_SERVER_TOKEN"
"""Environment variable with the token that a server demands."""
PARENT_VARIABLE = "SELFDISTILL_SERVER_PARENT"
"""Environment variable with the process id without which a server ends."""
SERVER_VARIABLE = "SELFDISTILL_SERVER_PROCESS"
"""Environment variable with the process id of the server, for its children."""
BACKEND = "selfdistill"
"""Our name among vLLM's weight-transfer backends."""

_ALIGNMENT = 16  # bytes: a tensor of any dtype may begin there
_POLL_SECONDS = 0.002


@dataclass(frozen=True)
class Layout:
    """What lies in a bucket: tensors one behind the other, each at the next multiple of 16 bytes."""

    names: list[str]
    dtypes: list[str]
    """``bfloat16`` for ``torch.bfloat16``."""
    shapes: list[list[int]]

    @property
    def sizes(self) -> list[int]:
        """Bytes of each tensor."""
        sizes = zip(self.shapes, self.dtypes, strict=True)
        return [math.prod(shape) * _dtype(name).itemsize for shape, name in sizes]

    @property
    def num_bytes(self) -> int:
        """Of the bucket, padding included."""
        return sum(map(_aligned, self.sizes))


def layout_of(tensors: Sequence[tuple[str, Tensor]]) -> Layout:
    """The layout of a bucket with these (Hugging Face name, full tensor)."""
    return Layout(
        names=[name for name, _ in tensors],
        dtypes=[str(tensor.dtype).removeprefix("torch.") for _, tensor in tensors],
        shapes=[list(tensor.shape) for _, tensor in tensors],
    )


@torch.no_grad()
def pack(tensors: Sequence[tuple[str, Tensor]], layout: Layout) -> Tensor:
    """The bucket ``[num_bytes]`` uint8, on the tensors' device."""
    packed = torch.empty(layout.num_bytes, dtype=torch.uint8, device=tensors[0][1].device)
    start = 0
    for (_, tensor), size in zip(tensors, layout.sizes, strict=True):
        packed[start : start + size].copy_(tensor.detach().contiguous().view(-1).view(torch.uint8))
        start += _aligned(size)
    return packed


def unpack(packed: Tensor, layout: Layout) -> list[tuple[str, Tensor]]:
    """The tensors of a bucket, as views of it."""
    tensors = []
    start = 0
    for name, dtype, shape, size in zip(layout.names, layout.dtypes, layout.shapes, layout.sizes, strict=True):
        tensors.append((name, packed[start : start + size].view(_dtype(dtype)).view(shape)))
        start += _aligned(size)
    return tensors


def digest(names: Iterable[str]) -> str:
    """Of a set of names, whatever their order; a name that comes twice counts twice."""
    return hashlib.blake2b("\0".join(sorted(names)).encode(), digest_size=16).hexdigest()


def open_group(
    backend: str, store: dist.TCPStore, rank: int, world_size: int, address: str, timeout_s: float
) -> dist.ProcessGroup:
    """A process group of its own, beside whatever default group a process has.

    ``backend``: gloo or nccl.  ``address``: of this host, by which the others of the group reach it (gloo).
    A collective among ``world_size`` processes.  Raises RuntimeError where one does not come within ``timeout_s``.
    """
    timeout = datetime.timedelta(seconds=timeout_s)
    prefixed = dist.PrefixStore(BACKEND, store)
    if backend == "gloo":
        gloo: Any = dist.ProcessGroupGloo  # type: ignore[attr-defined]
        options = gloo._Options()
        options._timeout = timeout
        options._devices = [gloo.create_device(hostname=address)]
        return gloo(prefixed, rank, world_size, options)
    nccl: Any = dist.ProcessGroupNCCL  # type: ignore[attr-defined]
    options = nccl.Options()
    options._timeout = timeout
    return nccl(prefixed, rank, world_size, options)


def broadcast(
    group: dist.ProcessGroup, tensor: Tensor, timeout_s: float, given_up: Callable[[], bool] = lambda: False
) -> None:
    """``tensor`` of rank 0 on all ranks of ``group``.

    Raises RuntimeError when a peer is lost, after ``timeout_s``, and as soon as ``given_up()``; the group is then
    useless.
    """
    options = dist.BroadcastOptions()
    options.rootRank, options.rootTensor = 0, 0
    work = group.broadcast([tensor], options)
    deadline = time.monotonic() + timeout_s
    # NCCL's wait() returns at once and a peer that is gone shows nowhere else, so completion is asked for.
    while not work.is_completed():
        if given_up():
            raise RuntimeError("the transfer has failed at another place")
        if time.monotonic() > deadline:
            raise RuntimeError(f"a broadcast of {tensor.numel()} bytes did not finish within {timeout_s:g} s")
        time.sleep(_POLL_SECONDS)
    work.wait()
    if tensor.is_cuda:
        torch.cuda.synchronize(tensor.device)


def close_group(group: dist.ProcessGroup, broken: bool) -> None:
    """Leave ``group``; the caller drops its reference.  ``broken``: a broadcast raised, and may be going on still."""
    if group.name() == "nccl":
        group.abort()
    elif broken:
        # gloo cannot break off, and the destructor would wait for the peer that is gone: there shall be none.
        ctypes.pythonapi.Py_IncRef(ctypes.py_object(group))


def own_address(host: str, port: int) -> str:
    """The address of this machine on the way to ``host``."""
    family, kind, protocol, _, target = socket.getaddrinfo(host, port, type=socket.SOCK_DGRAM)[0]
    with socket.socket(family, kind, protocol) as probe:
        probe.connect(target)  # a datagram socket: nothing is sent
        return probe.getsockname()[0]


def boot_id() -> str:
    """Of the kernel that runs here: the same in all containers of a host, another on every other host."""
    return Path("/proc/sys/kernel/random/boot_id").read_text().strip()


def nccl_version() -> str | None:
    """Return the version of the NCCL library that torch uses in this process, such as "2.27.5"; None without a GPU."""
    if not torch.cuda.is_available():
        return None
    return ".".join(map(str, torch.cuda.nccl.version()))


def visible_gpus() -> list[str]:
    """Return the UUID of each GPU that this process sees, by device index; empty without a GPU."""
    if not torch.cuda.is_available():
        return []
    return [str(torch.cuda.get_device_properties(index).uuid) for index in range(torch.cuda.device_count())]


def as_arguments(engine_args: Mapping[str, Any]) -> list[str]:
    """``{"max_num_seqs": 8, "enable_prefix_caching": False}`` as vLLM's command line says it."""
    arguments = []
    for name, value in engine_args.items():
        option = f"--{name.replace('_', '-')}"
        if isinstance(value, bool):
            arguments.append(option if value else option.replace("--", "--no-", 1))
        elif isinstance(value, (list, tuple)):
            arguments += [option, *map(str, value)]
        else:
            arguments.append(f"{option}={json.dumps(value) if isinstance(value, Mapping) else value}")
    return arguments


def _aligned(num_bytes: int) -> int:
    return math.ceil(num_bytes / _ALIGNMENT) * _ALIGNMENT


def _dtype(name: str) -> torch.dtype:
    dtype = getattr(torch, name, None)
    if not isinstance(dtype, torch.dtype):
        raise ValueError(f"expected the name of a torch dtype, got {name!r}")
    return dtype
