# Copyright (c) 2026 the megatron_selfdistill authors. Apache-2.0.
"""Which way of transfer reaches all workers of all servers: one server's workers may be on several hosts."""

from __future__ import annotations

import socket
from collections.abc import Sequence
from pathlib import Path

import torch

from megatron_selfdistill.config import ConfigError
from megatron_selfdistill.rollout.client import VllmServer
from megatron_selfdistill.rollout.transfer import bucket_file
from megatron_selfdistill.rollout.wire import boot_id


def choose_transfer(name: str | None, servers: Sequence[VllmServer], *, folder: str, on_gpu: bool) -> str:
    """``name``, as ``rollout.transfer`` says it, where that reaches every worker of ``servers``.  None: nccl for a
    trainer on GPUs, else shared_memory where every worker can read what lies in ``folder``, else gloo.

    On rank 0; asks each server once or not at all.  Raises `ConfigError` where ``name`` leaves workers out or
    ``folder`` cannot be written to, `EngineError` where a server does not answer.
    """
    if name == "ipc":
        _refuse_other_hosts(servers)
    if name == "shared_memory":
        blind = _first_blind(servers, folder)
        if blind is not None:
            raise ConfigError(
                f"rollout.transfer=shared_memory leaves weights in rollout.transfer_dir={folder} of "
                f"{socket.gethostname()}, where {blind} cannot read them: set a folder on a file system that both "
                "share, or rollout.transfer=nccl (gloo without GPUs)"
            )
    if name is not None:
        return name
    if on_gpu:
        return "nccl"
    return "gloo" if _first_blind(servers, folder) is not None else "shared_memory"


def _refuse_other_hosts(servers: Sequence[VllmServer]) -> None:
    for server in servers:
        for worker in server.workers():
            if worker["boot_id"] != boot_id():
                raise ConfigError(
                    f"rollout.transfer=ipc hands over memory of a GPU of {socket.gethostname()}, but a worker of "
                    f"{server.address} runs on {worker['host']}: set rollout.transfer=nccl"
                )


def _first_blind(servers: Sequence[VllmServer], folder: str) -> str | None:
    """A worker that cannot read files as buckets are: with their owner, their mode and their place."""
    try:
        with bucket_file(Path(folder), torch.zeros(1, dtype=torch.uint8)) as probe:
            for server in servers:
                for rank, answer in enumerate(server.call_all("can_read", str(probe))):
                    if not answer["can_read"]:
                        return f"worker {rank} of {server.address}, on {answer['host']},"
    except OSError as error:
        raise ConfigError(f"rollout.transfer_dir={folder} cannot be written to: {error}") from error
    return None
