# Copyright (c) 2026 the megatron_selfdistill authors. Apache-2.0.
"""The gloo groups of the ranks in rank_worker.py: Megatron Core makes about 20 groups in each call on each rank."""

from __future__ import annotations

import socket
from datetime import timedelta
from typing import Any

import torch.distributed as dist
from torch.distributed import distributed_c10d


class OneDeviceGloo(dist.ProcessGroupGloo):
    """A gloo group on the one device of all groups of the process; torch makes a thread and a socket for each."""

    _device: Any = None

    def __init__(
        self, store: dist.Store, rank: int, size: int, timeout: timedelta | None = None, **of_newer_torch: Any
    ) -> None:
        if OneDeviceGloo._device is None:
            OneDeviceGloo._device = dist.ProcessGroupGloo.create_default_device()
        options = dist.ProcessGroupGloo._Options()  # type: ignore[attr-defined]
        options._devices = [OneDeviceGloo._device]
        if timeout is not None:
            options._timeout = timeout
        super().__init__(store, rank, size, options)


def share_device() -> None:
    """Let every gloo group that this process and its forks make be a `OneDeviceGloo`."""
    distributed_c10d.ProcessGroupGloo = OneDeviceGloo  # type: ignore[misc]


def join_group(listener: socket.socket, rank: int, world_size: int, timeout: timedelta) -> None:
    """Make the default group of a call on all of its ranks; rank 0 keeps the store at the port of the listener."""
    port = listener.getsockname()[1]
    store: dist.Store
    if world_size == 1:
        store = dist.HashStore()
    elif rank == 0:
        store = dist.TCPStore("127.0.0.1", port, world_size, True, timeout, master_listen_fd=listener.detach())
    else:
        listener.close()  # so that only rank 0 listens: its end refuses the others
        store = dist.TCPStore("127.0.0.1", port, world_size, False, timeout)
    dist.init_process_group("gloo", store=store, rank=rank, world_size=world_size, timeout=timeout)
