# Copyright (c) 2026 the megatron_selfdistill authors. Apache-2.0.
"""Memory of the trainer that vLLM servers on the same host read: files in memory, and memory of a GPU."""

from __future__ import annotations

import base64
import contextlib
import fcntl
import os
import re
import secrets
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, Generic, Protocol, TypeVar

import torch
from torch import Tensor

from megatron_selfdistill.engines.vllm.protocol import pin
from megatron_selfdistill.errors import ConfigError

_PREFIX, _SUFFIX = "selfdistill-", ".bucket"
_EXPANDABLE = re.compile(r"expandable_segments\s*:\s*true", re.IGNORECASE)


class Buffer(Protocol):
    """A piece of memory for one bucket at a time."""

    memory: Tensor
    """Bytes ``[num_bytes]`` uint8."""

    def close(self) -> None:
        """Free the memory, which no server reads any more."""
        ...


BufferT = TypeVar("BufferT", bound=Buffer)


class TwoBuffers(Generic[BufferT]):
    """Two buffers that take turns, so that one can be filled while servers read the other.

    ``make`` makes a buffer of a size in bytes.  The buffers last until `close`, so that their pages exist already when
    the next update comes.
    """

    def __init__(self, make: Callable[[int], BufferT]) -> None:
        self._make = make
        self._buffers: list[BufferT | None] = [None, None]
        self._turn = 0

    def next(self, num_bytes: int) -> BufferT:
        """Return the buffer whose turn it is, of at least ``num_bytes``, which no server may be reading any more."""
        self._turn = 1 - self._turn
        buffer = self._buffers[self._turn]
        if buffer is None or buffer.memory.numel() < num_bytes:
            if buffer is not None:
                self._buffers[self._turn] = None
                buffer.close()
            buffer = self._buffers[self._turn] = self._make(num_bytes)
        return buffer

    def close(self) -> None:
        """Free both buffers; `next` makes new ones."""
        for buffer in self._buffers:
            if buffer is not None:
                buffer.close()
        self._buffers = [None, None]


class PrivateMemory:
    """A buffer in main memory that no other process sees."""

    def __init__(self, num_bytes: int) -> None:
        self.memory = torch.empty(num_bytes, dtype=torch.uint8)

    def close(self) -> None:
        """Do nothing: the memory is freed with this object."""


class MappedFile:
    """A file in ``directory`` that this process and servers on this host have mapped: ``memory`` is its bytes.

    Only the owner may read the file.  `close` removes it, or the next trainer does where this one was killed.

    Raises `ConfigError` where ``directory`` has no room for the file.
    """

    def __init__(self, directory: Path, num_bytes: int) -> None:
        self._file, self.path = _locked_file(directory)
        self._unpin: Callable[[], None] = lambda: None
        try:
            # A page that the file system has no room for would end this process when it is written to.
            os.posix_fallocate(self._file.fileno(), 0, num_bytes)
        except OSError as error:
            self.close()
            raise ConfigError(
                f"rollout.transfer_dir={directory} has no room for a bucket of {num_bytes / 2**20:.0f} MiB ({error}), "
                "and there are two: make it larger, name another directory, or lower rollout.bucket_mb"
            ) from error
        self.memory = torch.from_file(str(self.path), shared=True, size=num_bytes, dtype=torch.uint8)
        self._unpin = pin(self.memory)

    def close(self) -> None:
        """Remove the file; its pages are freed when no process has it mapped any more."""
        self._unpin()
        self._unpin = lambda: None
        self.path.unlink(missing_ok=True)
        self._file.close()


class SharedGpuMemory:
    """Memory of this process's GPU that processes on the same host open by ``handle``, a dictionary of JSON values.

    torch keeps shared memory until its counter is 0.  The counter starts at 1 and has no sign, so that memory which two
    processes have opened, or one process twice, would stay for ever: receivers do not count (`IpcReceiver`), and
    `close` decrements the counter, since servers answer when they have read.
    """

    def __init__(self, num_bytes: int) -> None:
        self.memory = _gpu_memory(num_bytes)
        shared = self.memory.untyped_storage()._share_cuda_()
        _, handle, size, offset, self._counter, self._counter_offset, event, event_sync = shared
        self.handle: dict[str, Any] = {
            "gpu": str(torch.cuda.get_device_properties(self.memory.device).uuid),
            "handle": base64.b64encode(handle).decode(),
            "storage_bytes": size,
            "storage_offset": offset,
            "event_handle": base64.b64encode(event).decode(),
            "event_sync": event_sync,
        }

    def close(self) -> None:
        """Free the memory, which servers have read."""
        device = self.memory.device
        torch.UntypedStorage._release_ipc_counter(self._counter, self._counter_offset, device=device)
        del self.memory
        torch.cuda.ipc_collect()


def _gpu_memory(num_bytes: int) -> Tensor:
    with without_expandable_segments():
        return torch.empty(num_bytes, dtype=torch.uint8, device="cuda")


def segments_expand() -> bool:
    """Return whether torch's settings let its segments of GPU memory grow in place (expandable_segments)."""
    return _EXPANDABLE.search(_allocator_settings()) is not None


@contextlib.contextmanager
def without_expandable_segments() -> Iterator[None]:
    """Let torch allocate GPU memory by cudaMalloc inside, whatever its settings; other settings stay as they are.

    Memory of expandable segments needs other handles, which torch 2.11 to 2.13 do not open reliably.
    """
    settings = _allocator_settings()
    if not segments_expand():
        yield
        return
    _set_allocator_settings(_EXPANDABLE.sub("expandable_segments:False", settings))
    try:
        yield
    finally:
        _set_allocator_settings(settings)


def _allocator_settings() -> str:
    """Return all settings of torch's allocator in its own form, since torch resets those that a new string lacks."""
    if hasattr(torch._C, "_accelerator_getAllocatorSettings"):
        return torch._C._accelerator_getAllocatorSettings()
    return os.environ.get("PYTORCH_ALLOC_CONF") or os.environ.get("PYTORCH_CUDA_ALLOC_CONF", "")


def _set_allocator_settings(settings: str) -> None:
    if hasattr(torch._C, "_accelerator_setAllocatorSettings"):
        torch._C._accelerator_setAllocatorSettings(settings)
    else:
        torch.cuda.memory._set_allocator_settings(settings)


@contextlib.contextmanager
def bucket_file(directory: Path, packed: Tensor) -> Iterator[Path]:
    """Yield the path of a file with the bytes of ``packed`` that other hosts can read; remove it afterwards."""
    bucket, path = _locked_file(directory)
    with bucket:
        try:
            bucket.write(packed.numpy().data)
            bucket.flush()
            os.fsync(bucket.fileno())  # only then does a network file system show the bytes to other hosts
            yield path
        finally:
            path.unlink(missing_ok=True)


def remove_abandoned(directory: Path) -> None:
    """Remove buckets in ``directory`` whose writer has ended, so that no process holds their lock."""
    for path in directory.glob(f"{_PREFIX}*{_SUFFIX}"):
        # It may be another user's, removed meanwhile, or locked.
        with contextlib.suppress(OSError), open(path, "rb") as bucket:
            fcntl.flock(bucket, fcntl.LOCK_EX | fcntl.LOCK_NB)
            path.unlink()


def _locked_file(directory: Path) -> tuple[Any, Path]:
    """Return a new file, open and locked by this process, and its path.

    The file gets the name that `remove_abandoned` looks for only when it is locked.
    """
    name = _PREFIX + secrets.token_hex(8)
    path = directory / (name + _SUFFIX)
    file = open(directory / name, "x+b", opener=lambda path, flags: os.open(path, flags, 0o600))  # noqa: SIM115
    fcntl.flock(file, fcntl.LOCK_EX)
    os.rename(directory / name, path)
    return file, path
