# Copyright (c) 2026 the megatron_selfdistill authors. Apache-2.0.
"""Tasks over servers that may fail: each task is done once, or the call raises."""

from __future__ import annotations

import asyncio
import threading
from collections import Counter
from collections.abc import Callable
from typing import Any

import pytest

from megatron_selfdistill.engines.vllm.client import RequestRefused, VllmServer
from megatron_selfdistill.engines.vllm.coroutines import Work
from megatron_selfdistill.engines.vllm.server_batch import dispatch


def servers_of(count: int) -> list[VllmServer]:
    return [VllmServer(f"http://server{i}:1") for i in range(count)]


def counting(count: int, before: Callable[[int, VllmServer], None]) -> tuple[list[Any], dict[int, str]]:
    """Return tasks that return their number, and where each was done."""
    where: dict[int, str] = {}

    def task(i: int) -> Callable[[VllmServer], Work[int]]:
        def do(server: VllmServer) -> int:
            before(i, server)
            where[i] = server.address
            return i

        return lambda server: asyncio.to_thread(do, server)

    return [task(i) for i in range(count)], where


@pytest.mark.parametrize("error", [RequestRefused("the prompt is too long"), KeyError("ours")])
def test_an_error_that_is_no_servers_is_raised_at_once_and_its_task_is_not_tried_elsewhere(error):
    failed: list[str] = []

    def before(i: int, server: VllmServer) -> None:
        if i == 4:
            failed.append(server.address)
            raise error

    tasks, _ = counting(12, before)
    with pytest.raises(type(error), match=str(error)):
        dispatch(tasks, servers_of(2), lambda index, i: None)
    assert len(failed) == 1


def test_a_fast_server_takes_over_from_a_slow_one(monkeypatch):
    monkeypatch.setattr("megatron_selfdistill.engines.vllm.server_batch.MAX_IN_FLIGHT", 2)
    servers = servers_of(2)
    slow, quick = Counter[int](), Counter[int]()
    all_begun = threading.Event()

    def before(i: int, server: VllmServer) -> None:
        (slow if server is servers[0] else quick)[i] += 1
        if len(slow) + len(quick) == 24:
            all_begun.set()
        if server is servers[0]:
            all_begun.wait()

    tasks, where = counting(24, before)
    dispatch(tasks, servers, lambda index, i: None)
    assert Counter(where.values())[servers[1].address] >= 22
