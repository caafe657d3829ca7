# Copyright (c) 2026 the megatron_selfdistill authors. Apache-2.0.
"""Many servers and many requests at once: few threads, and no connection is left behind."""

from __future__ import annotations

import sys
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager

import psutil
import pytest
from fake_server_sampler import GREEDY, sampler
from fake_vllm import fake_servers, generated

from megatron_selfdistill.engines.vllm.client import VllmServer
from megatron_selfdistill.engines.vllm.coroutines import run
from megatron_selfdistill.engines.vllm.engine_output import EngineRequest
from megatron_selfdistill.rollout.base import Request

TIMEOUT = 120.0


def wait_until(condition: Callable[[], bool], seconds: float = 30.0) -> None:
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.01)


@contextmanager
def counted_threads() -> Iterator[Callable[[], int]]:
    """Count this process's threads meanwhile; yield a function that returns the most so far but the counting one."""
    most, ended = [0], threading.Event()

    def count() -> None:
        while not ended.wait(0.01):
            most[0] = max(most[0], threading.active_count() - 1)

    counting = threading.Thread(target=count)
    counting.start()
    try:
        yield lambda: most[0]
    finally:
        ended.set()
        counting.join()


def most_threads(addresses: list[str], work: str) -> tuple[int, int]:
    """Return the threads of a rank without servers, and the most while all servers do some work."""
    before = threading.active_count()
    with sampler(addresses, {}, timeout_s=60.0) as (built, _):
        if work != "update":
            built.update_weights(0)
        with counted_threads() as most:
            if work == "update":
                built.update_weights(0)
            else:
                requests = [Request([1, 6], i) for i in range(16 * PER_SERVER)]
                assert len(built.generate(requests, GREEDY)) == len(requests)
            return before, most()


PER_SERVER = 32
"""Requests that each of 16 servers works on at once."""


@pytest.mark.full
def test_sampling_on_sixteen_servers_takes_a_handful_of_threads(ranks):
    with fake_servers(16) as fakes:
        for fake in fakes:
            fake.together = sys.maxsize

        def release() -> None:
            wait_until(lambda: all(fake.begun == PER_SERVER for fake in fakes))
            time.sleep(0.2)
            for fake in fakes:
                fake.together = 0

        with ThreadPoolExecutor(1) as thread:
            released = thread.submit(release)
            addresses = [fake.address for fake in fakes]
            [(before, most)] = ranks.run(most_threads, addresses, "plain", world_size=1, timeout=TIMEOUT)
            released.result()  # all requests were in flight at once
    assert most - before <= 4


def test_a_weight_update_of_sixteen_servers_takes_a_handful_of_threads_and_asks_all_at_once(ranks):
    with fake_servers(16) as fakes:
        steps = ["/pause", "/init_weight_transfer_engine", "/update_weights", "/finish_weight_update"]

        def hang_at(path: str) -> None:
            for fake in fakes:
                fake.hangs_at = path

        def release() -> None:
            for step, following in zip(steps, [*steps[1:], ""], strict=True):
                wait_until(lambda step=step: all(step in fake.calls for fake in fakes))
                time.sleep(0.2)
                hang_at(following)

        hang_at(steps[0])
        with ThreadPoolExecutor(1) as thread:
            released = thread.submit(release)
            addresses = [fake.address for fake in fakes]
            [(before, most)] = ranks.run(most_threads, addresses, "update", world_size=1, timeout=TIMEOUT)
            released.result()
        assert all(fake.version == "0" for fake in fakes)
    assert most - before <= 4


def test_no_descriptor_is_left_behind():
    with fake_servers(1) as [fake]:
        server = VllmServer(fake.address, timeout_s=60, vocab_size=50)
        run(server.health())
        before = psutil.Process().num_fds()
        assert len(generated(server, [EngineRequest([i], {"max_tokens": 50}) for i in range(40)])) == 40
        wait_until(lambda: psutil.Process().num_fds() <= before)
