# Copyright (c) 2026 the megatron_selfdistill authors. Apache-2.0.
"""Ways in which weights go from the trainer's rank 0 to vLLM servers, one class each; weight_update.py uses them."""

from __future__ import annotations

import contextlib
import fcntl
import logging
import os
import secrets
import socket
import threading
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Mapping, Sequence
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
from megatron_selfdistill.engines.vllm.protocol import Layout, boot_id, layout_of, nccl_version, own_gpu, pack, pin
from megatron_selfdistill.engines.vllm.server.server_names import own_address
from megatron_selfdistill.engines.vllm.server_pool import Failures, on_each
from megatron_selfdistill.engines.vllm.transfer_group import broadcast, close_group, open_group
from megatron_selfdistill.errors import ConfigError, EngineError

logger = logging.getLogger(__name__)

_PREFIX, _SUFFIX = "selfdistill-", ".bucket"


def choose_transfer(name: str | None, servers: Sequence[VllmServer], *, directory: str, on_gpu: bool) -> str:
    """Return the transfer for ``servers``: ``name``, the value of ``rollout.transfer``, where that is not None.

    For None, a trainer on GPUs takes nccl if every worker has the trainer's version of NCCL.  Otherwise the trainer
    takes shared_memory if every worker can read files in ``directory``, then gloo, and logs both versions.  A trainer
    on a CPU takes shared_memory or gloo by the same rule.

    Rank 0 calls this function before it forms any process group; each server is asked at most twice.

    Raises: `ConfigError` where a named transfer does not reach every worker or ``directory`` cannot be written to,
    `EngineError` where a server does not answer.
    """
    if name == "gloo":
        return name
    if name != "shared_memory":
        why_not = _why_not_nccl(servers, on_gpu)
        if why_not is None:
            return "nccl"
        if name == "nccl":
            raise ConfigError(f"rollout.transfer=nccl cannot reach every vLLM worker: {why_not}")
    blind = _first_blind(servers, directory)
    if name == "shared_memory":
        if blind is not None:
            raise ConfigError(
                f"rollout.transfer=shared_memory leaves weights in rollout.transfer_dir={directory} of "
                f"{socket.gethostname()}, where {blind} cannot read them: set a directory on a file system that both "
                "share, or rollout.transfer=nccl (gloo without GPUs)"
            )
        return name
    chosen = "shared_memory" if blind is None else "gloo"
    if on_gpu:
        logger.warning("weights reach the vLLM servers by rollout.transfer=%s, not nccl: %s", chosen, why_not)
    return chosen


def _named(server: VllmServer, rank: int, place: Mapping[str, Any]) -> str:
    return f"worker {rank} of {server.address}, on {place['host']},"


def _why_not_nccl(servers: Sequence[VllmServer], on_gpu: bool) -> str | None:
    """Return why NCCL cannot join this process and all workers in one group, or None if it can.

    NCCL refuses a group whose members have different versions, down to the last number, or share a GPU.
    """
    own = nccl_version() if on_gpu else None
    if own is None:
        return "the trainer runs on a CPU, and NCCL needs GPUs: set rollout.transfer=gloo or shared_memory, or null"
    members = {own_gpu(): "the trainer"}
    workers = [(server, rank, place) for server in servers for rank, place in enumerate(run(server.workers()))]
    for server, rank, place in workers:
        worker, theirs, gpu = _named(server, rank, place), place.get("nccl"), place.get("gpu")
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
        members[gpu] = worker
    return None


def _first_blind(servers: Sequence[VllmServer], directory: str) -> str | None:
    """Return the first worker that cannot read a file with the owner, mode and directory of a bucket, or None."""
    try:
        with bucket_file(Path(directory), torch.zeros(1, dtype=torch.uint8)) as probe:
            for server in servers:
                answers = run(server.call_all("can_read", str(probe)))
                for rank, answer in enumerate(answers):
                    if not answer["can_read"]:
                        return _named(server, rank, answer)
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

    @abstractmethod
    def forget(self, server: VllmServer) -> None:
        """Note that the server was started anew and so has lost the data of `join`."""

    @abstractmethod
    def close(self) -> None:
        """Leave all servers and free all memory."""


class SharedMemoryTransfer(Transfer):
    """A transfer through files in ``directory``: in memory (/dev/shm), or on a file system that the servers share.

    Where all workers are on this host, two files last as long as this object, and trainer and servers have them mapped.
    A network file system does not keep two mappings equal, so workers of other hosts read a file per bucket, which is
    removed when all workers have read it.  Files that a killed trainer left are removed by the next trainer.
    """

    def __init__(self, directory: str | Path) -> None:
        self._directory = Path(directory)
        self._joined: set[VllmServer] = set()
        self._files: list[MappedFile | None] = [None, None]  # they take turns
        self._elsewhere: set[VllmServer] = set()
        remove_abandoned(self._directory)

    def join(self, servers: Sequence[VllmServer]) -> Failures:
        """Invite the servers that have not joined yet; return the servers that failed."""
        failures = on_each([server for server in servers if server not in self._joined], self._invite)
        self._joined = set(servers) - set(failures)
        return failures

    def pack(self, tensors: Sequence[tuple[str, Tensor]]) -> Bucket:
        """Return a bucket in one of the two mapped files, or in main memory if a worker is on another host."""
        layout = layout_of(tensors)
        if self._elsewhere & self._joined:
            return Bucket(layout, pack(tensors, layout).cpu())
        self._files.reverse()
        file = self._files[0]
        if file is None or file.memory.numel() < layout.num_bytes:
            if file is not None:
                self._files[0] = None
                file.close()
            file = self._files[0] = MappedFile(self._directory, layout.num_bytes)
        return Bucket(layout, pack(tensors, layout, file.memory), {"path": str(file.path), "mapped": True})

    def send(self, bucket: Bucket, servers: Sequence[VllmServer]) -> Failures:
        """Let each server read the mapped file, or a file that lasts for this call; return the servers that failed."""
        file = contextlib.nullcontext() if bucket.where else bucket_file(self._directory, bucket.packed)
        with file as path:
            where = bucket.where or {"path": str(path)}
            return on_each(servers, lambda server: server.update_weights(**vars(bucket.layout), where=where))

    def forget(self, server: VllmServer) -> None:
        """Invite the server again at the next `join`."""
        self._joined.discard(server)

    def close(self) -> None:
        """Remove the two mapped files."""
        for file in self._files:
            if file is not None:
                file.close()
        self._files = [None, None]

    async def _invite(self, server: VllmServer) -> None:
        here = all(worker["boot_id"] == boot_id() for worker in await server.workers())
        (self._elsewhere.discard if here else self._elsewhere.add)(server)
        await server.init_weight_transfer("shared_memory", {})


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
        self._memories = [torch.empty(0, dtype=torch.uint8)] * 2  # of gloo's buckets; they take turns

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
                addresses.update([own_address(*server.place), *(own_address(each, 1) for each in workers)])
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

        failures = on_each(servers, invite, own=enter)
        self._joined = [] if failures else list(servers)
        if failures:
            self.close()
        return failures

    def pack(self, tensors: Sequence[tuple[str, Tensor]]) -> Bucket:
        """Return a bucket in main memory (gloo) or in new memory of the tensors' device (nccl)."""
        layout = layout_of(tensors)
        if self._backend != "gloo":
            return Bucket(layout, pack(tensors, layout))
        self._memories.reverse()
        if self._memories[0].numel() < layout.num_bytes:
            self._memories[0] = torch.empty(layout.num_bytes, dtype=torch.uint8)
        return Bucket(layout, pack(tensors, layout, self._memories[0]))

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

        failures = on_each(servers, load, own=offer)
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
