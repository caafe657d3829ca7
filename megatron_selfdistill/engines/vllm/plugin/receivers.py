# Copyright (c) 2026 the megatron_selfdistill authors. Apache-2.0.
"""The receiving ends of transfer.py: one class per way in which a bucket of weights reaches a worker.

A receiver takes the device of the worker and the worker's number in its server.  ``receive`` returns a bucket as
``[num_bytes]`` uint8 on the device.  The bytes stay valid until the trainer learns that the bucket is loaded; then the
same memory may hold a later bucket.  ``close`` leaves the trainer, and is called once.

This module imports no vLLM, so that every way can be tested without it.
"""

from __future__ import annotations

import os
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from megatron_selfdistill.engines.vllm.protocol import pin
from megatron_selfdistill.engines.vllm.transfer_group import broadcast, close_group, open_group


class FileReceiver:
    """A receiver that reads files of the trainer.

    A file that the trainer keeps is mapped once, and on a CPU its own memory is the bucket.  A file that the trainer
    removes afterwards is read as a whole, since on a network file system pages of a removed file cannot be read later.
    """

    def __init__(self, device: torch.device, worker: int) -> None:
        self._device = device
        self._mapped: dict[str, Tensor] = {}
        self._unpin: dict[str, Callable[[], None]] = {}

    def receive(self, num_bytes: int, where: dict[str, Any]) -> Tensor:
        """Return the first bytes of the file ``where["path"]``."""
        path = where["path"]
        return (self._map(path, num_bytes) if where.get("mapped") else _read(path, num_bytes)).to(self._device)

    def close(self) -> None:
        """Unmap all files."""
        for path in list(self._mapped):
            self._drop(path)

    def _map(self, path: str, num_bytes: int) -> Tensor:
        if path not in self._mapped:
            for known in [known for known in self._mapped if not os.path.exists(known)]:
                self._drop(known)
            size = os.path.getsize(path)
            self._mapped[path] = torch.from_file(path, shared=True, size=size, dtype=torch.uint8)
            if self._device.type != "cpu":
                self._unpin[path] = pin(self._mapped[path])
        return self._mapped[path][:num_bytes]

    def _drop(self, path: str) -> None:
        self._unpin.pop(path, lambda: None)()
        del self._mapped[path]


def _read(path: str, num_bytes: int) -> Tensor:
    packed = torch.empty(num_bytes, dtype=torch.uint8)
    with open(path, "rb") as bucket:
        got = bucket.readinto(packed.numpy().data)
    if got != num_bytes:
        raise ValueError(f"expected {num_bytes} bytes in {path}, got {got}")
    return packed


class BroadcastReceiver:
    """A receiver in a process group of the trainer (rank 0) and the workers of all servers."""

    def __init__(
        self,
        device: torch.device,
        worker: int,
        *,
        backend: str,
        host: str,
        port: int,
        first_rank: int,
        world_size: int,
        timeout_s: float,
    ) -> None:
        self._device = device
        self._arrives_on = torch.device("cpu") if backend == "gloo" else device
        self._timeout_s = timeout_s
        self._broken = False
        self._memory = torch.empty(0, dtype=torch.uint8)  # of gloo's buckets: on a GPU torch keeps memory for the next
        self._group = open_group(backend, host, port, first_rank + worker, world_size, device, timeout_s)

    def receive(self, num_bytes: int, where: dict[str, Any]) -> Tensor:
        """Return the next broadcast of rank 0."""
        packed = self._place(num_bytes)
        self._broken = True
        broadcast(self._group, packed, self._timeout_s)
        self._broken = False
        return packed.to(self._device)

    def _place(self, num_bytes: int) -> Tensor:
        if self._arrives_on.type != "cpu":
            return torch.empty(num_bytes, dtype=torch.uint8, device=self._arrives_on)
        if self._memory.numel() < num_bytes:
            self._memory = torch.empty(num_bytes, dtype=torch.uint8)
        return self._memory[:num_bytes]

    def close(self) -> None:
        """Leave the process group."""
        close_group(self._group, self._broken)
        del self._group


Receiver = FileReceiver | BroadcastReceiver
RECEIVERS: dict[str, Any] = {"shared_memory": FileReceiver, "gloo": BroadcastReceiver, "nccl": BroadcastReceiver}
"""Name of a transfer -> the class of its receivers, whose arguments the trainer sends."""
