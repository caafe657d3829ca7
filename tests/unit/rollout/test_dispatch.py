# Copyright (c) 2026 the megatron_selfdistill authors. Apache-2.0.
"""Tasks over servers that may fail: each task is done once, or the call raises."""

from __future__ import annotations

import asyncio
import threading
import time
from collections import Counter
from collections.abc import Callable
from typing import Any

import pytest

from megatron_selfdistill.engines.vllm.client import VllmServer
from megatron_selfdistill.engines.vllm.coroutines import Work
from megatron_selfdistill.engines.vllm.http.response_answer import RequestRefused
from megatron_selfdistill.engines.vllm.server_batch import dispatch
from megatron_selfdistill.errors import EngineError


def servers_of(count: int) -> list[VllmServer]:
    """Return clients of servers that do not exist; tasks do not call them."""
    return [VllmServer(f"http://server{i}:1") for i in range(count)]


def counting(count: int, before: Callable[[int, VllmServer], None]) -> tuple[list[Any], Counter[int], dict[int, str]]:
    """Return tasks that return their number, how often each was done, and where."""
    done: Counter[int] = Counter()
    where: dict[int, str] = {}
    lock = threading.Lock()

    def task(i: int) -> Callable[[VllmServer], Work[int]]:
        def do(server: VllmServer) -> int:
            before(i, server)
            with lock:
                done[i] += 1
                where[i] = server.address
            return i

        return lambda server: asyncio.to_thread(do, server)

    return [task(i) for i in range(count)], done, where


def test_every_task_is_done_once_and_results_keep_the_order():
    tasks, done, where = counting(53, lambda i, server: time.sleep(0.001 * (i % 5)))
    dispatched = dispatch(tasks, servers_of(3))
    assert dispatched.results == list(range(53))
    assert set(done.values()) == {1} and not dispatched.num_retried and not dispatched.failures
    assert len(set(where.values())) == 3


def test_what_a_dead_server_had_is_done_by_the_others_once():
    servers = servers_of(3)
    asked: Counter[str] = Counter()

    def before(i: int, server: VllmServer) -> None:
        asked[server.address] += 1
        time.sleep(0.01)
        if server is servers[1] and i >= 20:
            raise EngineError(f"{server.address}: gone")

    tasks, done, where = counting(60, before)
    dispatched = dispatch(tasks, servers)
    assert dispatched.results == list(range(60))
    assert set(done.values()) == {1}
    assert list(dispatched.failures) == [servers[1]] and str(dispatched.failures[servers[1]]).endswith("gone")
    assert dispatched.num_retried > 0
    assert asked[servers[1].address] <= 20  # its own share; nothing new once it has failed
    assert servers[1].address not in where.values()


def test_when_all_servers_are_dead_the_error_names_each_and_why():
    def before(i: int, server: VllmServer) -> None:
        raise EngineError(f"{server.address}: out of order")

    tasks, _, _ = counting(9, before)
    with pytest.raises(EngineError, match=r"left for 9 of 9 requests: .*server0:1: out of order.*server1:1: out of"):
        dispatch(tasks, servers_of(2))


def test_a_refused_request_is_not_tried_elsewhere():
    refused: list[str] = []

    def before(i: int, server: VllmServer) -> None:
        if i == 4:
            refused.append(server.address)
            raise RequestRefused("the prompt is too long")
        time.sleep(0.05)

    tasks, _, _ = counting(12, before)
    with pytest.raises(RequestRefused, match="too long"):
        dispatch(tasks, servers_of(2))
    assert len(refused) == 1


def test_an_error_of_ours_is_raised_and_no_server_is_blamed():
    def before(i: int, server: VllmServer) -> None:
        if i == 3:
            raise KeyError("ours")

    tasks, _, _ = counting(8, before)
    with pytest.raises(KeyError, match="ours"):
        dispatch(tasks, servers_of(2))


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
            assert all_begun.wait(60)

    tasks, _, where = counting(24, before)
    dispatch(tasks, servers)
    assert Counter(where.values())[servers[1].address] >= 22


def test_each_result_arrives_once_on_the_callers_thread_also_where_a_server_fails():
    servers = servers_of(2)
    arrived: list[tuple[int, threading.Thread]] = []

    def before(i: int, server: VllmServer) -> None:
        if server is servers[0] and i > 3:
            raise EngineError("gone")

    tasks, _, _ = counting(20, before)
    assert dispatch(tasks, servers, lambda index, i: arrived.append((i, threading.current_thread()))).num_retried
    assert sorted(i for i, _ in arrived) == list(range(20))
    assert {thread for _, thread in arrived} == {threading.current_thread()}


def test_no_tasks_give_no_results():
    assert dispatch([], servers_of(2)).results == []
