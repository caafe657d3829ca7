# Copyright (c) 2026 the megatron_selfdistill authors. Apache-2.0.
"""The group of a broadcast: it forms, or every living member is soon free again, even if other members fail."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any

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
