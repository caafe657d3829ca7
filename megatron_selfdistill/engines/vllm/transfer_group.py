# Copyright (c) 2026 the megatron_selfdistill authors. Apache-2.0.
"""The process group in which weights are broadcast from the trainer to the workers of vLLM servers.

It exists beside all groups that either side has.  A member that dies, or never comes, costs the others a bounded time
and nothing else.

The members meet at a `TCPStore` of rank 0 before they form the group, since neither gloo nor NCCL gives up on a member
that does not come: ``ncclCommInitRank`` waits for ever, in the thread that calls it.  The members form the group in a
thread of its own, which is abandoned if the group does not form.  NCCL's non-blocking mode would need no thread, but
torch keeps it off by default since 2.7.1 because it hung with NCCL 2.26.
"""

from __future__ import annotations

import contextlib
import ctypes
import datetime
import os
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from megatron_selfdistill.engines.vllm.server.server_names import BACKEND, own_address

FORMING_SECONDS = 120.0
"""Seconds in which a group must form; less than any sensible stop.hang_timeout_minutes."""

_LOOK_SECONDS = 0.02
_SHORTEST_SLEEP_SECONDS, _LONGEST_SLEEP_SECONDS = 0.0001, 0.002
_GO, _STOP = "go", "stop"

# Read when a ProcessGroupNCCL is made.  By default its watchdog ends the process if a peer is lost.  Here the
# peer is a server, and the trainer goes on with the other servers.
_NCCL_ENVIRONMENT = {"TORCH_NCCL_ASYNC_ERROR_HANDLING": "0", "TORCH_NCCL_WAIT_TIMEOUT_DUMP_MILSEC": "1000"}

GiveUp = Callable[[], bool]


def open_group(
    backend: str,
    host: str,
    port: int,
    rank: int,
    world_size: int,
    device: torch.device,
    timeout_s: float,
    given_up: GiveUp = lambda: False,
) -> dist.ProcessGroup:
    """Return a process group of ``world_size`` members, which all call this; it is no member's default group.

    ``backend`` is gloo or nccl.  ``host`` and ``port`` belong to the `TCPStore` that rank 0 keeps open.  ``device`` is
    this member's GPU (nccl).  ``timeout_s`` bounds later broadcasts, and forming where it is less than
    `FORMING_SECONDS`.

    Raises: RuntimeError where a member does not come or the group does not form in that time, where rank 0 gives up or
    has ended, and, within a fraction of a second, where ``given_up()`` is true.
    """
    limit = min(timeout_s, FORMING_SECONDS)
    deadline = time.monotonic() + limit
    control, store = (_store(host, port, limit) for _ in range(2))  # a store serves one waiting thread at a time

    def why_stop() -> str | None:
        if given_up():
            return "another member has failed"
        if rank != 0 and control.check([_STOP]):
            return "the trainer has given up"
        return f"{limit:g} s are over" if time.monotonic() > deadline else None

    def make() -> dist.ProcessGroup:
        if backend == "gloo":
            return _gloo(store, rank, world_size, own_address(host, port), timeout_s)
        return _nccl(store, rank, world_size, device, timeout_s)

    try:
        _meet(control, rank, world_size, why_stop)
        return _formed(make, why_stop)
    except Exception:
        if rank == 0:
            control.set(_STOP, "")
        raise


def broadcast(group: dist.ProcessGroup, tensor: Tensor, timeout_s: float, given_up: GiveUp = lambda: False) -> None:
    """Copy ``tensor`` of rank 0 to all ranks of ``group``, into tensors of the same size.

    Raises: RuntimeError when a peer is lost, after ``timeout_s``, and as soon as ``given_up()`` is true; the group is
    useless afterwards.
    """
    options = dist.BroadcastOptions()
    options.rootRank, options.rootTensor = 0, 0
    work = group.broadcast([tensor], options)
    deadline = time.monotonic() + timeout_s
    sleep = _SHORTEST_SLEEP_SECONDS
    # NCCL's wait() returns at once, and only a query of completion shows a peer that has gone.
    while not work.is_completed():
        if given_up():
            raise RuntimeError("the transfer has failed at another member")
        if time.monotonic() > deadline:
            raise RuntimeError(f"a broadcast of {tensor.numel()} bytes did not finish within {timeout_s:g} s")
        time.sleep(sleep)
        sleep = min(2 * sleep, _LONGEST_SLEEP_SECONDS)
    work.wait()


def close_group(group: dist.ProcessGroup, broken: bool) -> None:
    """Leave ``group``; the caller drops its reference.

    ``broken``: a broadcast has raised, and may still be going on.
    """
    if group.name() == "nccl":
        group.abort()
    elif broken:
        # gloo cannot abort, and the destructor would wait for the lost peer: this reference prevents its call.
        ctypes.pythonapi.Py_IncRef(ctypes.py_object(group))


def _store(host: str, port: int, timeout_s: float) -> dist.Store:
    timeout = datetime.timedelta(seconds=timeout_s)
    return dist.PrefixStore(
        BACKEND, dist.TCPStore(host, port, is_master=False, timeout=timeout, wait_for_workers=False)
    )


def _meet(control: dist.Store, rank: int, world_size: int, why_stop: Callable[[], str | None]) -> None:
    """Return when all members have come; rank 0 waits for each of the others and lets them go together."""
    if rank == 0:
        others = {f"here-{other}": other for other in range(1, world_size)}
        while not control.check(list(others)):
            time.sleep(_LOOK_SECONDS)
            if (why := why_stop()) is not None:
                absent = [other for key, other in others.items() if not control.check([key])]
                raise RuntimeError(f"ranks {absent} of {world_size} did not come to the process group: {why}")
        control.set(_GO, "")
        return
    control.set(f"here-{rank}", "")
    while True:
        why = why_stop()  # before the look at _GO: rank 0 may let the members go and give up between two looks
        if control.check([_GO]):
            return
        if why is not None:
            raise RuntimeError(f"the process group of {world_size} did not meet: {why}")
        time.sleep(_LOOK_SECONDS)


def _formed(make: Callable[[], dist.ProcessGroup], why_stop: Callable[[], str | None]) -> dist.ProcessGroup:
    """Return the result of ``make`` in a thread of its own, which is abandoned when ``why_stop`` has a reason."""
    made: list[dist.ProcessGroup] = []
    errors: list[Exception] = []
    ended = threading.Event()

    def work() -> None:
        try:
            made.append(make())
        except Exception as error:
            errors.append(error)
        finally:
            ended.set()

    threading.Thread(target=work, name="process group", daemon=True).start()
    while not ended.wait(_LOOK_SECONDS):
        if (why := why_stop()) is not None:
            raise RuntimeError(f"the process group did not form: {why}")
    if not made:
        raise RuntimeError(f"the process group did not form: {errors[0] if errors else 'its thread ended'}")
    return made[0]


def _gloo(store: dist.Store, rank: int, world_size: int, address: str, timeout_s: float) -> dist.ProcessGroup:
    """Return a gloo group; the other members reach this host by ``address``."""
    gloo: Any = dist.ProcessGroupGloo
    options = gloo._Options()
    options._timeout = datetime.timedelta(seconds=timeout_s)
    options._devices = [gloo.create_device(hostname=address)]
    group: dist.ProcessGroup = gloo(store, rank, world_size, options)
    return group


def _nccl(store: dist.Store, rank: int, world_size: int, device: torch.device, timeout_s: float) -> dist.ProcessGroup:
    """Return a group whose communicator exists already: torch would make it in the first broadcast, and block there."""
    nccl: Any = dist.ProcessGroupNCCL
    options = nccl.Options()
    # `broadcast` gives up and aborts before torch's own watchdog does.
    options._timeout = datetime.timedelta(seconds=2 * timeout_s + 60)
    torch.cuda.set_device(device)
    with _environment(_NCCL_ENVIRONMENT):
        formed = nccl(store, rank, world_size, options)
    formed.eager_connect_single_device(device)
    group: dist.ProcessGroup = formed
    return group


@contextlib.contextmanager
def _environment(values: Mapping[str, str]) -> Iterator[None]:
    before = {name: os.environ.get(name) for name in values}
    os.environ.update(values)
    try:
        yield
    finally:
        for name, value in before.items():
            if value is None:
                del os.environ[name]
            else:
                os.environ[name] = value
