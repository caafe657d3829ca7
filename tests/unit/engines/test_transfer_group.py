# Copyright (c) 2026 the megatron_selfdistill authors. Apache-2.0.
"""The group of a broadcast: it forms, or every living member is soon free again, even if other members fail."""

from __future__ import annotations

import os
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any, ClassVar

import pytest
import torch
import torch.distributed as dist

from megatron_selfdistill.engines.vllm import transfer_group
from megatron_selfdistill.engines.vllm.transfer_group import broadcast, open_group

CPU = torch.device("cpu")
LONG = 3600.0  # seconds that outlast the test, where nobody is to wait so long

DIES_WHILE_FORMING = """
import os, sys, torch
from megatron_selfdistill.engines.vllm import transfer_group
transfer_group._gloo = lambda *arguments: os._exit(7)
transfer_group.open_group("gloo", "127.0.0.1", int(sys.argv[1]), 1, 3, torch.device("cpu"), 3600.0)
"""


@pytest.fixture(autouse=True)
def patience(monkeypatch: pytest.MonkeyPatch) -> None:
    """Let a group form, and a member connect, for as long as the machine takes."""
    connect = transfer_group._store
    monkeypatch.setattr(transfer_group, "FORMING_SECONDS", LONG)
    monkeypatch.setattr(transfer_group, "_store", lambda host, port, timeout_s: connect(host, port, LONG))


@pytest.fixture
def store() -> dist.TCPStore:
    return dist.TCPStore("127.0.0.1", 0, None, True, wait_for_workers=False)


@pytest.fixture
def threads() -> Iterator[ThreadPoolExecutor]:
    with ThreadPoolExecutor(4) as pool:
        yield pool


def opened(
    threads: ThreadPoolExecutor, store: dist.TCPStore, rank: int, size: int, timeout_s: float, **more: Any
) -> Future[dist.ProcessGroup]:
    return threads.submit(open_group, "gloo", "127.0.0.1", store.port, rank, size, CPU, timeout_s, **more)


def sentence(opening: Future[dist.ProcessGroup]) -> str:
    with pytest.raises(RuntimeError) as raised:
        opening.result()
    return str(raised.value)


def test_a_member_that_dies_while_the_group_forms_costs_the_others_moments(store, threads):
    with subprocess.Popen([sys.executable, "-c", DIES_WHILE_FORMING, str(store.port)]) as dying:
        trainer = opened(threads, store, 0, 3, LONG, given_up=lambda: dying.poll() is not None)
        survivor = opened(threads, store, 2, 3, LONG)
        assert dying.wait() == 7
        assert "did not form: another member has failed" in sentence(trainer)
        assert "did not form: the trainer has given up" in sentence(survivor)
    again = dist.TCPStore("127.0.0.1", 0, None, True, wait_for_workers=False)
    openings = [opened(threads, again, rank, 2, LONG) for rank in range(2)]
    groups = [opening.result() for opening in openings]
    arrived = torch.zeros(3)
    sending = threads.submit(broadcast, groups[0], torch.ones(3), LONG)
    broadcast(groups[1], arrived, LONG)
    sending.result()
    assert arrived.tolist() == [1, 1, 1]


def test_a_member_that_never_comes_is_named_when_the_time_is_over(store, threads):
    opening = opened(threads, store, 0, 3, 0.5)
    assert sentence(opening) == "ranks [1, 2] of 3 did not come to the process group: 0.5 s are over"
    assert "did not meet" in sentence(opened(threads, store, 2, 3, LONG)), "the trainer has given up"


@pytest.mark.full
def test_a_trainer_that_is_gone_frees_the_others(threads):
    code = (
        "import torch.distributed as dist, sys, time\n"
        "store = dist.TCPStore('127.0.0.1', 0, None, True, wait_for_workers=False)\n"
        "print(store.port, flush=True)\n"
        "dist.PrefixStore(sys.argv[1], store).get('here-1')\n"
        "print('came', flush=True)\n"
        "time.sleep(600)"
    )
    command = [sys.executable, "-c", code, transfer_group.BACKEND]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as trainer:
        port = int(trainer.stdout.readline())
        waiting = threads.submit(open_group, "gloo", "127.0.0.1", port, 1, 2, CPU, LONG)
        assert trainer.stdout.readline() == "came\n"
        trainer.kill()
        sentence(waiting)


class StandIn:
    """A stand-in for ProcessGroupNCCL that records the calls, and an environment variable at the making of a group."""

    done: ClassVar[list[Any]] = []
    connect: ClassVar[Callable[[], None]] = staticmethod(lambda: None)

    class Options:
        """A stand-in for ProcessGroupNCCL.Options."""

        _timeout: Any = None

    def __init__(self, store: Any, rank: int, size: int, options: Options) -> None:
        handling = os.environ.get("TORCH_NCCL_ASYNC_ERROR_HANDLING")
        StandIn.done.append((rank, size, options._timeout.total_seconds(), handling))

    def eager_connect_single_device(self, device: torch.device) -> None:
        StandIn.connect()
        StandIn.done.append(device)


@pytest.fixture
def nccl(monkeypatch) -> Iterator[type[StandIn]]:
    monkeypatch.setattr(dist, "ProcessGroupNCCL", StandIn, raising=False)
    monkeypatch.setattr(torch.cuda, "set_device", lambda device: StandIn.done.append(f"set {device}"))
    monkeypatch.setenv("TORCH_NCCL_ASYNC_ERROR_HANDLING", "3")
    StandIn.done, StandIn.connect = [], staticmethod(lambda: None)
    yield StandIn


def test_an_nccl_group_is_connected_when_it_opens_and_its_watchdog_ends_nobody(nccl, store):
    device = torch.device("cuda", 3)
    open_group("nccl", "127.0.0.1", store.port, 0, 1, device, 10.0)
    made = nccl.done[1]
    assert nccl.done == ["set cuda:3", (0, 1, made[2], "0"), device]
    assert made[2] > 10.0  # torch's watchdog comes after `broadcast` has given up
    assert os.environ["TORCH_NCCL_ASYNC_ERROR_HANDLING"] == "3"


def test_an_nccl_group_that_blocks_while_it_connects_is_left_behind(nccl, store):
    never = threading.Event()
    nccl.connect = staticmethod(never.wait)
    with pytest.raises(RuntimeError, match=r"did not form: 0.5 s are over"):
        open_group("nccl", "127.0.0.1", store.port, 0, 1, torch.device("cuda", 0), 0.5)
    never.set()
