# Copyright (c) 2026 the megatron_selfdistill authors. Apache-2.0.
"""Choose the transfer that reaches all workers of all servers.

The workers of one server may be on several hosts, and servers may run in another environment than the trainer, with
another NCCL.
"""

from __future__ import annotations

import logging
import socket
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from megatron_selfdistill.errors import ConfigError
from megatron_selfdistill.rollout.vllm.client import VllmServer
from megatron_selfdistill.rollout.vllm.protocol import boot_id, nccl_version, own_gpu
from megatron_selfdistill.rollout.vllm.transfer_buckets import bucket_file

logger = logging.getLogger(__name__)


def choose_transfer(name: str | None, servers: Sequence[VllmServer], *, directory: str, on_gpu: bool) -> str:
    """Return the transfer for ``servers``: ``name``, the value of ``rollout.transfer``, where that is not None.

    For None, a trainer on GPUs takes nccl if every worker has the trainer's version of NCCL.  Otherwise the trainer
    takes ipc if every worker sees the GPU of this process, then shared_memory if every worker can read files in
    ``directory``, then gloo, and logs both versions.  A trainer on a CPU takes shared_memory or gloo by the same rule.

    Rank 0 calls this function before it forms any process group; each server is asked at most twice.

    Raises: `ConfigError` where a named transfer does not reach every worker or ``directory`` cannot be written to,
    `EngineError` where a server does not answer.
    """
    if name in ("nccl", "ipc"):
        _refuse(name, _why_not_nccl(servers, on_gpu) if name == "nccl" else _why_not_ipc(servers, on_gpu))
    if name == "shared_memory":
        blind = _first_blind(servers, directory)
        if blind is not None:
            raise ConfigError(
                f"rollout.transfer=shared_memory leaves weights in rollout.transfer_dir={directory} of "
                f"{socket.gethostname()}, where {blind} cannot read them: set a directory on a file system that both "
                "share, or rollout.transfer=nccl (gloo without GPUs)"
            )
    if name is not None:
        return name
    why_not_nccl = _why_not_nccl(servers, on_gpu)
    if why_not_nccl is None:
        return "nccl"
    if on_gpu and _why_not_ipc(servers, on_gpu) is None:
        chosen = "ipc"
    else:
        chosen = "gloo" if _first_blind(servers, directory) is not None else "shared_memory"
    if on_gpu:
        logger.warning("weights reach the vLLM servers by rollout.transfer=%s, not nccl: %s", chosen, why_not_nccl)
    return chosen


@dataclass(frozen=True)
class _Worker:
    """One worker of one server, and its description of itself."""

    server: VllmServer
    rank: int
    place: dict[str, Any]

    def __str__(self) -> str:
        return f"worker {self.rank} of {self.server.address}, on {self.place['host']},"


def _workers(servers: Sequence[VllmServer]) -> list[_Worker]:
    return [_Worker(server, rank, place) for server in servers for rank, place in enumerate(server.workers())]


def _refuse(name: str, why: str | None) -> None:
    if why is not None:
        raise ConfigError(f"rollout.transfer={name} cannot reach every vLLM worker: {why}")


def _why_not_nccl(servers: Sequence[VllmServer], on_gpu: bool) -> str | None:
    """Return why NCCL cannot join this process and all workers in one group, or None where it can.

    NCCL refuses a group whose members have different versions, down to the last number, or share a GPU.
    """
    own = nccl_version() if on_gpu else None
    if own is None:
        return "the trainer runs on a CPU, and NCCL needs GPUs: set rollout.transfer=gloo or shared_memory, or null"
    members = {own_gpu(): "the trainer"}
    for worker in _workers(servers):
        theirs, gpu = worker.place.get("nccl"), worker.place.get("gpu")
        if theirs != own:
            return (
                f"the trainer on {socket.gethostname()} has NCCL {own} and {worker} has "
                f"{f'NCCL {theirs}' if theirs else 'no NCCL'}, but NCCL needs the same version everywhere: install one "
                "version in both environments, or set rollout.transfer=null, which takes another way"
            )
        if gpu is not None and gpu in members:
            return (
                f"{members[gpu]} and {worker} compute on the same GPU, {gpu}, but NCCL needs one for each: give the "
                "server GPUs of its own, or set rollout.transfer=null, which takes another way"
            )
        members[gpu] = str(worker)
    return None


def _why_not_ipc(servers: Sequence[VllmServer], on_gpu: bool) -> str | None:
    """Return why a worker cannot open memory of this process's GPU, or None where all workers can."""
    if not on_gpu:
        return "the trainer runs on a CPU, and ipc hands over memory of a GPU: set rollout.transfer=null"
    gpu = own_gpu()
    for worker in _workers(servers):
        if worker.place["boot_id"] != boot_id():
            return f"ipc hands over memory of a GPU of {socket.gethostname()}, but {worker} does not run there"
        seen = worker.place.get("gpus") or []
        if gpu not in seen:
            return (
                f"the weights lie on GPU {gpu}, which {worker} does not see (it sees {', '.join(seen) or 'none'}): "
                "start the server with that GPU in CUDA_VISIBLE_DEVICES, behind its own, or set rollout.transfer=null"
            )
    return None


def _first_blind(servers: Sequence[VllmServer], directory: str) -> str | None:
    """Return the first worker that cannot read a file with the owner, mode and directory of a bucket, or None."""
    try:
        with bucket_file(Path(directory), torch.zeros(1, dtype=torch.uint8)) as probe:
            for server in servers:
                for rank, answer in enumerate(server.described("can_read", str(probe), can_read=bool, host=str)):
                    if not answer["can_read"]:
                        return str(_Worker(server, rank, answer))
    except OSError as error:
        raise ConfigError(f"rollout.transfer_dir={directory} cannot be written to: {error}") from error
    return None
