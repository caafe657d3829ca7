# Copyright (c) 2026 the megatron_selfdistill authors. Apache-2.0.
"""Weights from the trainer's rank 0 to vLLM servers: one class per way, and the update that any of them serves.

    update = WeightUpdate(transfer, servers, version)  # on rank 0
    for tensors in exporter.stream():                  # on every rank
        update.send(tensors)
    update.finish()
    update.failures                                    # servers that have no whole update, and why

A server answers nothing between the first call and the last, and what it says of a broken update is no version at all.
"""

from __future__ import annotations

import base64
import contextlib
import fcntl
import os
import secrets
import threading
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor, wait
from pathlib import Path
from typing import Any, Protocol

import torch
import torch.distributed as dist
from torch import Tensor

from megatron_selfdistill.rollout.client import VllmServer
from megatron_selfdistill.rollout.errors import EngineError
from megatron_selfdistill.rollout.transfer_group import broadcast, close_group, open_group
from megatron_selfdistill.rollout.wire import digest, layout_of, own_address, pack

LOADING = "loading"
"""What a server says of its weights while they arrive; no number, so no response with it is ever used."""

_GRACE_SECONDS = 5.0
_PREFIX, _SUFFIX = "selfdistill-", ".bucket"

Failures = dict[VllmServer, Exception]


class Transfer(Protocol):
    """One way in which weights reach servers.  Rank 0 of the trainer alone has one."""

    isolated: bool
    """A server that fails leaves the update of the others whole."""

    def join(self, servers: Sequence[VllmServer]) -> Failures:
        """Make ``servers``, and no others, ready to receive; again is cheap.  Returns those that could not."""
        ...

    def send(self, tensors: Sequence[tuple[str, Tensor]], servers: Sequence[VllmServer]) -> Failures:
        """Let ``servers``, as joined, load a bucket of (Hugging Face name, full tensor), which may be used again when
        this returns.  Returns those that did not."""
        ...

    def forget(self, server: VllmServer) -> None:
        """The server has lost what `join` told it: it was started anew."""
        ...

    def close(self) -> None: ...


class WeightUpdate:
    """The weights of one moment on their way to several servers at once.

    ``servers`` are those that still take part, ``failures`` the others.  Where the transfer is not ``isolated``, one
    that fails ends the update of all: `broken` tells so, and the others need a new update.
    """

    def __init__(self, transfer: Transfer, servers: Sequence[VllmServer], version: int) -> None:
        self._transfer = transfer
        self._version = version
        self._names: list[str] = []
        self.servers = list(servers)
        self.failures: Failures = {}
        self.num_bytes = 0
        self._drop(on_each(self.servers, _begin))
        self._drop(transfer.join(self.servers) if self.servers else {})
        if not self.broken:
            self._each(lambda server: server.start_weight_update())

    @property
    def isolated(self) -> bool:
        """Of the transfer: who failed did so alone, and need not be asked again."""
        return self._transfer.isolated

    @property
    def broken(self) -> bool:
        """Nobody gets a whole update."""
        return not self.servers or bool(self.failures and not self._transfer.isolated)

    def send(self, tensors: Sequence[tuple[str, Tensor]]) -> None:
        """One bucket; may be empty.  Returns when all servers have loaded it."""
        if self.broken or not tensors:
            return
        self._names += [name for name, _ in tensors]
        self.num_bytes += sum(tensor.nbytes for _, tensor in tensors)
        self._drop(self._transfer.send(tensors, self.servers))

    def finish(self) -> None:
        """Servers that got every tensor answer with the new weights from here on."""
        if self.broken:
            return
        complete = digest(self._names)

        def end(server: VllmServer) -> None:
            server.update_weights(complete=complete)
            server.finish_weight_update(str(self._version))
            server.resume()

        # What fails here has no part in the transfer any more, so it is one server's own affair.
        failures = on_each(self.servers, end)
        self.servers = [server for server in self.servers if server not in failures]
        self.failures.update(failures)

    def _each(self, do: Callable[[VllmServer], None]) -> None:
        self._drop(on_each(self.servers, do))

    def _drop(self, failures: Failures) -> None:
        self.failures.update(failures)
        self.servers = [server for server in self.servers if server not in failures]


def make_transfer(name: str, *, folder: str, timeout_s: float) -> Transfer:
    """The transfer that ``rollout.transfer`` names; ``folder`` is of shared_memory, ``timeout_s`` of the others."""
    if name == "shared_memory":
        return SharedMemoryTransfer(folder)
    if name == "ipc":
        return IpcTransfer()
    return BroadcastTransfer(name, timeout_s)


class _OfferedTransfer:
    """Each bucket is offered in one place, from which every server copies it before it answers."""

    isolated = True
    _name: str

    def __init__(self) -> None:
        self._joined: set[VllmServer] = set()

    def join(self, servers: Sequence[VllmServer]) -> Failures:
        failures = on_each(
            [server for server in servers if server not in self._joined],
            lambda server: server.init_weight_transfer(self._name, {}),
        )
        self._joined = set(servers) - set(failures)
        return failures

    def send(self, tensors: Sequence[tuple[str, Tensor]], servers: Sequence[VllmServer]) -> Failures:
        layout = layout_of(tensors)
        with self._offered(pack(tensors, layout)) as where:
            return on_each(servers, lambda server: server.update_weights(**vars(layout), where=where))

    def forget(self, server: VllmServer) -> None:
        self._joined.discard(server)

    def close(self) -> None:
        """Nothing is held between two buckets."""

    def _offered(self, packed: Tensor) -> contextlib.AbstractContextManager[dict[str, Any]]:
        """Where servers find the bytes of ``packed``, for as long as the context lasts."""
        raise NotImplementedError


class SharedMemoryTransfer(_OfferedTransfer):
    """Through a file per bucket in ``folder``: in memory (/dev/shm), or on a file system that the servers share.

    A file is removed when all servers have read it; one that a killed trainer left is removed by the next.
    """

    _name = "shared_memory"

    def __init__(self, folder: str | Path) -> None:
        super().__init__()
        self._folder = Path(folder)
        _remove_abandoned(self._folder)

    @contextlib.contextmanager
    def _offered(self, packed: Tensor) -> Iterator[dict[str, Any]]:
        with bucket_file(self._folder, packed.cpu()) as path:
            yield {"path": str(path)}


class IpcTransfer(_OfferedTransfer):
    """Through this rank's GPU memory, which the workers of servers on the same node open by a CUDA IPC handle."""

    _name = "ipc"

    @contextlib.contextmanager
    def _offered(self, packed: Tensor) -> Iterator[dict[str, Any]]:
        torch.cuda.synchronize(packed.device)
        try:
            yield _ipc_handle(packed)
        finally:
            del packed  # the last of it here: what follows frees memory that no process has open any more
            torch.cuda.ipc_collect()


class BroadcastTransfer:
    """One broadcast per bucket in a process group of this process (rank 0) and all workers of all servers, beside the
    trainer's own groups.  ``backend``: gloo (through main memory) or nccl (each worker on a GPU of its own)."""

    isolated = False

    def __init__(self, backend: str, timeout_s: float) -> None:
        self._backend = backend
        self._timeout_s = timeout_s
        self._joined: list[VllmServer] = []
        self._group: dist.ProcessGroup | None = None
        self._store: dist.TCPStore | None = None
        self._broken = False

    def join(self, servers: Sequence[VllmServer]) -> Failures:
        if self._group is not None and self._joined == list(servers):
            return {}
        self.close()
        sizes: dict[VllmServer, int] = {}
        addresses: set[str] = set()

        def ask(server: VllmServer) -> None:
            sizes[server] = server.world_size()
            workers = {worker["address"] for worker in server.workers()} - {""}
            addresses.update([own_address(server.host, server.port), *(own_address(each, 1) for each in workers)])

        failures = on_each(servers, ask)
        if failures:
            return failures
        first_rank, ranks = 1, {}
        for server in servers:
            ranks[server] = first_rank
            first_rank += sizes[server]
        # Workers on this machine can be reached by any of its addresses, the others not by 127.0.0.1.
        address = min(addresses, key=lambda each: each.startswith("127."))
        self._store = dist.TCPStore(address, 0, first_rank, True, wait_for_workers=False)
        common = {
            "backend": self._backend,
            "host": address,
            "port": self._store.port,
            "world_size": first_rank,
            "timeout_s": self._timeout_s,
        }

        device = torch.device("cuda", torch.cuda.current_device()) if self._backend == "nccl" else torch.device("cpu")
        port, failed = self._store.port, threading.Event()

        def enter() -> None:
            self._group = open_group(
                self._backend, address, port, 0, first_rank, device, self._timeout_s, given_up=failed.is_set
            )

        def invite(server: VllmServer) -> None:
            try:
                server.init_weight_transfer(self._backend, {**common, "first_rank": ranks[server]})
            except Exception:
                failed.set()
                raise

        failures = on_each_while(enter, servers, invite)
        self._joined = [] if failures else list(servers)
        if failures:
            self.close()
        return failures

    def send(self, tensors: Sequence[tuple[str, Tensor]], servers: Sequence[VllmServer]) -> Failures:
        layout = layout_of(tensors)
        packed = pack(tensors, layout)
        if self._backend == "gloo":
            packed = packed.cpu()
        failed = threading.Event()

        def offer() -> None:
            assert self._group is not None
            try:
                broadcast(self._group, packed, self._timeout_s, given_up=failed.is_set)
            except RuntimeError:
                self._broken = True
                raise

        def load(server: VllmServer) -> None:
            try:
                server.update_weights(**vars(layout))
            except Exception:
                failed.set()
                raise

        failures = on_each_while(offer, servers, load)
        if failures:  # whoever failed may have left it
            self.close()
        return failures

    def forget(self, server: VllmServer) -> None:
        if server in self._joined:
            self.close()

    def close(self) -> None:
        if self._group is not None:
            close_group(self._group, self._broken)
        self._group = self._store = None
        self._broken = False
        self._joined = []


def on_each(servers: Sequence[VllmServer], do: Callable[[VllmServer], None]) -> Failures:
    """Call ``do`` on all servers at once; returns what it raised, by server."""
    return on_each_while(None, servers, do)


def on_each_while(
    own: Callable[[], None] | None, servers: Sequence[VllmServer], do: Callable[[VllmServer], None]
) -> Failures:
    """Call ``do`` on all servers at once and ``own`` meanwhile in this thread; return what ``do`` raised, by server.

    Where only ``own`` fails, that is every server's failure: it does not say whose fault it was.  A server that has not
    answered some seconds after ``own`` failed is waited for no longer, and fails.
    """
    if not servers:
        return {}
    own_error: Exception | None = None
    with ThreadPoolExecutor(len(servers), thread_name_prefix="server") as threads:
        answers = {server: threads.submit(do, server) for server in servers}
        if own is not None:
            try:
                own()
            except Exception as error:
                own_error = error
                silent = wait(answers.values(), _GRACE_SECONDS).not_done
                for server in [server for server, answer in answers.items() if answer in silent]:
                    server.interrupt()
        raised = {server: answer.exception() for server, answer in answers.items()}
    failures: Failures = {server: error for server, error in raised.items() if isinstance(error, Exception)}
    if own_error is not None and not failures:
        return {server: EngineError(f"{server.address}: {own_error}") for server in servers}
    return failures


def _begin(server: VllmServer) -> None:
    """Stop work, undo what an earlier trainer may have left, and disown the weights."""
    server.pause()
    server.set_weight_version(LOADING)
    server.call("abandon_weight_update")


@contextlib.contextmanager
def bucket_file(folder: Path, packed: Tensor) -> Iterator[Path]:
    """A file with the bytes of ``packed``, for as long as the context lasts."""
    name = _PREFIX + secrets.token_hex(8)
    path = folder / (name + _SUFFIX)
    with open(folder / name, "xb", opener=lambda file, flags: os.open(file, flags, 0o600)) as bucket:
        # It gets the name that `_remove_abandoned` looks for when it is locked, and its bytes when it has the name.
        fcntl.flock(bucket, fcntl.LOCK_EX)
        os.rename(folder / name, path)
        try:
            bucket.write(packed.numpy().data)
            bucket.flush()
            yield path
        finally:
            path.unlink(missing_ok=True)


def _remove_abandoned(folder: Path) -> None:
    """Remove buckets whose writer is gone: nobody holds their lock."""
    for path in folder.glob(f"{_PREFIX}*{_SUFFIX}"):
        with contextlib.suppress(OSError), open(path, "rb") as bucket:  # another user's, removed meanwhile, or locked
            fcntl.flock(bucket, fcntl.LOCK_EX | fcntl.LOCK_NB)
            path.unlink()


def _ipc_handle(packed: Tensor) -> dict[str, Any]:
    """What another process needs to open the memory of ``packed``."""
    _, handle, size, offset, counter, counter_offset, event, event_sync = packed.untyped_storage()._share_cuda_()
    return {
        "gpu": str(torch.cuda.get_device_properties(packed.device).uuid),
        "handle": base64.b64encode(handle).decode(),
        "storage_bytes": size,
        "storage_offset": offset,
        "counter_handle": base64.b64encode(counter).decode(),
        "counter_offset": counter_offset,
        "event_handle": base64.b64encode(event).decode(),
        "event_sync": event_sync,
    }
