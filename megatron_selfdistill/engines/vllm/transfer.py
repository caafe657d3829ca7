# Copyright (c) 2026 the megatron_selfdistill authors. Apache-2.0.
"""Ways in which weights go from the trainer's rank 0 to vLLM servers, one class each; weight_update.py uses them."""

from __future__ import annotations

import logging
import socket
import threading
from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass, field
from itertools import accumulate
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from megatron_selfdistill.distributed.signs_of_life import beat
from megatron_selfdistill.engines.vllm.client import VllmServer
from megatron_selfdistill.engines.vllm.coroutines import run
from megatron_selfdistill.engines.vllm.protocol import Layout, boot_id, layout_of, nccl_version, own_gpu, pack
from megatron_selfdistill.engines.vllm.server.server_names import own_address
from megatron_selfdistill.engines.vllm.server_pool import Failures, on_each, on_each_while
from megatron_selfdistill.engines.vllm.transfer_buckets import (
    MappedFile,
    PrivateMemory,
    SharedGpuMemory,
    TwoBuffers,
    bucket_file,
    remove_abandoned,
)
from megatron_selfdistill.engines.vllm.transfer_group import broadcast, close_group, open_group
from megatron_selfdistill.errors import ConfigError, EngineError

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
        why_not = _why_not_nccl(servers, on_gpu) if name == "nccl" else _why_not_ipc(servers, on_gpu)
        if why_not is not None:
            raise ConfigError(f"rollout.transfer={name} cannot reach every vLLM worker: {why_not}")
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
    return [_Worker(server, rank, place) for server in servers for rank, place in enumerate(run(server.workers()))]


def _why_not_nccl(servers: Sequence[VllmServer], on_gpu: bool) -> str | None:
    """Return why NCCL cannot join this process and all workers in one group, or None if it can.

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
    """Return why a worker cannot open memory of this process's GPU, or None if all workers can."""
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
                answers = run(server.call_all("can_read", str(probe)))
                for rank, answer in enumerate(answers):
                    if not answer["can_read"]:
                        return str(_Worker(server, rank, answer))
    except OSError as error:
        raise ConfigError(f"rollout.transfer_dir={directory} cannot be written to: {error}") from error
    return None


@dataclass(frozen=True)
class Bucket:
    """Tensors on their way, in memory of the transfer."""

    layout: Layout
    """Names, dtypes and shapes of the tensors."""
    packed: Tensor
    """Bytes ``[num_bytes]`` uint8 of all tensors, as `Layout` places them."""
    where: dict[str, Any] = field(default_factory=dict)
    """The place where servers find the bytes, as JSON for the receiver."""


class Transfer(ABC):
    """One way in which weights reach servers; rank 0 of the trainer alone has one."""

    isolated = True
    """Whether a server that fails leaves the update of the other servers complete."""

    @abstractmethod
    def join(self, servers: Sequence[VllmServer]) -> Failures:
        """Make ``servers``, and no others, ready to receive; return the servers that failed.

        A repetition with the same servers is cheap.
        """

    @abstractmethod
    def pack(self, tensors: Sequence[tuple[str, Tensor]]) -> Bucket:
        """Return a bucket of (Hugging Face name, full tensor); the tensors may be overwritten when this returns.

        The previous bucket may still be on its way, the bucket before that may not.
        """

    @abstractmethod
    def send(self, bucket: Bucket, servers: Sequence[VllmServer]) -> Failures:
        """Let ``servers``, as joined, load a bucket, and return the servers that failed.

        The bytes of the bucket are complete: the GPU has done the work that `pack` has queued.
        """

    def release(self) -> None:  # noqa: B027
        """Free the memory that only an update needs; the update is over, and no server reads from it any more."""

    @abstractmethod
    def forget(self, server: VllmServer) -> None:
        """Note that the server was started anew and so has lost the data of `join`."""

    @abstractmethod
    def close(self) -> None:
        """Leave all servers and free all memory."""


def make_transfer(name: str, *, directory: str, timeout_s: float) -> Transfer:
    """Return the transfer that ``rollout.transfer`` names.

    ``directory`` is used by shared_memory, ``timeout_s`` by gloo and nccl.
    """
    if name == "shared_memory":
        return SharedMemoryTransfer(directory)
    if name == "ipc":
        return IpcTransfer()
    return BroadcastTransfer(name, timeout_s)


class _OfferedTransfer(Transfer):
    """A transfer that offers each bucket in one place, where every server reads it before it answers."""

    _name: str

    def __init__(self) -> None:
        self._joined: set[VllmServer] = set()

    def join(self, servers: Sequence[VllmServer]) -> Failures:
        """Invite the servers that have not joined yet; return the servers that failed."""
        failures = on_each([server for server in servers if server not in self._joined], self._invite)
        self._joined = set(servers) - set(failures)
        return failures

    def send(self, bucket: Bucket, servers: Sequence[VllmServer]) -> Failures:
        """Let each server read the bucket; return the servers that failed."""
        return on_each(servers, lambda server: server.update_weights(**vars(bucket.layout), where=bucket.where))

    def forget(self, server: VllmServer) -> None:
        """Invite the server again at the next `join`."""
        self._joined.discard(server)

    async def _invite(self, server: VllmServer) -> None:
        await server.init_weight_transfer(self._name, {})


class SharedMemoryTransfer(_OfferedTransfer):
    """A transfer through files in ``directory``: in memory (/dev/shm), or on a file system that the servers share.

    Where all workers are on this host, two files last as long as this object, and trainer and servers have them mapped.
    A network file system does not keep two mappings equal, so workers of other hosts read a file per bucket, which is
    removed when all workers have read it.  Files that a killed trainer left are removed by the next trainer.
    """

    _name = "shared_memory"

    def __init__(self, directory: str | Path) -> None:
        super().__init__()
        self._directory = Path(directory)
        self._files = TwoBuffers(lambda num_bytes: MappedFile(self._directory, num_bytes))
        self._elsewhere: set[VllmServer] = set()
        remove_abandoned(self._directory)

    def pack(self, tensors: Sequence[tuple[str, Tensor]]) -> Bucket:
        """Return a bucket in one of the two mapped files, or in main memory if a worker is on another host."""
        layout = layout_of(tensors)
        if self._elsewhere & self._joined:
            return Bucket(layout, pack(tensors, layout).cpu())
        file = self._files.next(layout.num_bytes)
        return Bucket(layout, pack(tensors, layout, file.memory), {"path": str(file.path), "mapped": True})

    def send(self, bucket: Bucket, servers: Sequence[VllmServer]) -> Failures:
        """Let each server read the mapped file, or a file that lasts for this call; return the servers that failed."""
        if bucket.where:
            return super().send(bucket, servers)
        with bucket_file(self._directory, bucket.packed) as path:
            return super().send(Bucket(bucket.layout, bucket.packed, {"path": str(path)}), servers)

    def close(self) -> None:
        """Remove the two mapped files."""
        self._files.close()

    async def _invite(self, server: VllmServer) -> None:
        here = all(worker["boot_id"] == boot_id() for worker in await server.workers())
        (self._elsewhere.discard if here else self._elsewhere.add)(server)
        await super()._invite(server)


class IpcTransfer(_OfferedTransfer):
    """A transfer through this rank's GPU memory, which workers on the same host open by a CUDA IPC handle.

    Two buffers last for an update.
    """

    _name = "ipc"

    def __init__(self) -> None:
        super().__init__()
        self._buffers = TwoBuffers(SharedGpuMemory)

    def pack(self, tensors: Sequence[tuple[str, Tensor]]) -> Bucket:
        """Return a bucket in one of the two buffers."""
        layout = layout_of(tensors)
        buffer = self._buffers.next(layout.num_bytes)
        return Bucket(layout, pack(tensors, layout, buffer.memory), buffer.handle)

    def release(self) -> None:
        """Free the two buffers."""
        self._buffers.close()

    close = release


class BroadcastTransfer(Transfer):
    """One broadcast per bucket, in a process group of this process (rank 0) and all workers of all servers.

    The group exists beside the trainer's own groups.  ``backend`` is gloo (through main memory) or nccl (each worker on
    a GPU of its own).
    """

    isolated = False

    def __init__(self, backend: str, timeout_s: float) -> None:
        self._backend = backend
        self._timeout_s = timeout_s
        self._joined: list[VllmServer] = []
        self._group: dist.ProcessGroup | None = None
        self._store: dist.TCPStore | None = None
        self._broken = False
        self._buffers = TwoBuffers(PrivateMemory)

    def join(self, servers: Sequence[VllmServer]) -> Failures:
        """Form a new group with ``servers`` unless they form the group already; return the servers that failed."""
        if self._group is not None and self._joined == list(servers):
            return {}
        self.close()
        beat()  # the following calls take a bounded time, and may have to be made for each server
        sizes: dict[VllmServer, int] = {}
        nodes: dict[VllmServer, set[str]] = {}
        addresses: set[str] = set()

        async def ask(server: VllmServer) -> None:
            sizes[server] = await server.world_size()
            nodes[server] = {worker["address"] for worker in await server.workers()} - {""}

        failures = on_each(servers, ask)
        for server, workers in nodes.items():
            try:  # here, since a coroutine must not wait for the lookup of a name
                addresses.update([own_address(server.host, server.port), *(own_address(each, 1) for each in workers)])
            except OSError as error:
                failures[server] = EngineError(f"{server.address}: no way to its workers is known: {error}")
        if failures:
            return failures
        first_ranks = dict(zip(servers, accumulate((sizes[server] for server in servers), initial=1), strict=False))
        # Any address of this machine reaches its own workers; 127.0.0.1 does not reach workers on other machines.
        address = min(addresses, key=lambda each: each.startswith("127."))
        world_size = 1 + sum(sizes.values())
        self._store = dist.TCPStore(address, 0, world_size, True, wait_for_workers=False)
        arguments: dict[str, Any] = {
            "backend": self._backend,
            "host": address,
            "port": self._store.port,
            "world_size": world_size,
            "timeout_s": self._timeout_s,
        }
        device = torch.device("cuda", torch.cuda.current_device()) if self._backend == "nccl" else torch.device("cpu")
        failed = threading.Event()

        def enter() -> None:
            self._group = open_group(rank=0, device=device, given_up=failed.is_set, **arguments)

        async def invite(server: VllmServer) -> None:
            try:
                await server.init_weight_transfer(self._backend, {**arguments, "first_rank": first_ranks[server]})
            except Exception:
                failed.set()
                raise

        failures = on_each_while(enter, servers, invite)
        self._joined = [] if failures else list(servers)
        if failures:
            self.close()
        return failures

    def pack(self, tensors: Sequence[tuple[str, Tensor]]) -> Bucket:
        """Return a bucket in main memory (gloo) or in new memory of the tensors' device (nccl)."""
        layout = layout_of(tensors)
        into = self._buffers.next(layout.num_bytes).memory if self._backend == "gloo" else None
        return Bucket(layout, pack(tensors, layout, into))

    def send(self, bucket: Bucket, servers: Sequence[VllmServer]) -> Failures:
        """Broadcast the bucket to all workers; after a failure the group is closed."""
        failed = threading.Event()

        def offer() -> None:
            assert self._group is not None
            try:
                broadcast(self._group, bucket.packed, self._timeout_s, given_up=failed.is_set)
            except RuntimeError:
                self._broken = True
                raise

        async def load(server: VllmServer) -> None:
            try:
                await server.update_weights(**vars(bucket.layout))
            except Exception:
                failed.set()
                raise

        failures = on_each_while(offer, servers, load)
        if failures:  # a server that failed may have left the group
            self.close()
        return failures

    def forget(self, server: VllmServer) -> None:
        """Close the group if the server is a member."""
        if server in self._joined:
            self.close()

    def close(self) -> None:
        """Leave the group."""
        if self._group is not None:
            close_group(self._group, self._broken)
        self._group = self._store = None
        self._broken = False
        self._joined = []
