# Copyright (c) 2026 the megatron_selfdistill authors. Apache-2.0.
"""The process that speaks HTTP for rank 0: it is small, it loses no request, and it ends with rank 0."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path

import psutil
import pytest
from fake_server_sampler import GREEDY, sampler
from fake_vllm import FakeVllm, fake_servers, generated, tokens_behind

from megatron_selfdistill.errors import EngineError
from megatron_selfdistill.rollout.base import Request
from megatron_selfdistill.rollout.vllm.client import VllmServer
from megatron_selfdistill.rollout.vllm.engine_output import EngineOutput, EngineRequest
from megatron_selfdistill.rollout.vllm.http.http_process import HttpProcessEnded, http_process
from megatron_selfdistill.rollout.vllm.http.http_tasks import Ask, Messages
from megatron_selfdistill.rollout.vllm.server_batch import DispatchResult, Task, dispatch

HELD = 7
"""The first token of the prompts whose responses the servers hold back."""
CHILD = "megatron_selfdistill.rollout.vllm.http.child"
TIMEOUT = 120.0


@pytest.fixture
def fakes() -> Iterator[list[FakeVllm]]:
    with fake_servers(2) as servers:
        yield servers


def wait_until(condition: Callable[[], bool], seconds: float = 30.0) -> None:
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.01)


def response_to(prompt: list[int]) -> Task[EngineOutput]:
    request = EngineRequest(prompt, {"max_tokens": 3})

    def begin(server: VllmServer) -> Future[EngineOutput]:
        return server.begin(request, lambda output: output)

    return begin


def test_it_imports_no_library_of_the_trainer():
    code = f"import sys, {CHILD}; print(*sorted({{name.partition('.')[0] for name in sys.modules}}))"
    loaded = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout.split()
    assert "httpx" in loaded and not {"torch", "megatron", "numpy", "transformers"} & set(loaded)


def test_requests_that_a_killed_process_had_are_answered_once_and_no_server_is_blamed(fakes):
    servers = [VllmServer(fake.address, timeout_s=60, vocab_size=50) for fake in fakes]
    prompts = [[HELD if i % 2 else 1, i] for i in range(16)]
    for fake in fakes:
        fake.holds = [HELD]
    arrived: list[int] = []
    found: list[DispatchResult[EngineOutput]] = []
    tasks = [response_to(prompt) for prompt in prompts]
    thread = threading.Thread(
        target=lambda: found.append(dispatch(tasks, servers, lambda index, _: arrived.append(index)))
    )
    thread.start()
    wait_until(lambda: len(arrived) == 8)
    killed = http_process().pid
    os.kill(killed, signal.SIGKILL)
    wait_until(lambda: sum(fake.begun for fake in fakes) == 24)
    for fake in fakes:
        fake.holds = []
    thread.join(60)
    [dispatched] = found
    assert [output.token_ids for output in dispatched.results] == [tokens_behind(prompt, 3) for prompt in prompts]
    assert sorted(arrived) == list(range(16)) and dispatched.num_retried == 8 and not dispatched.failures
    assert http_process().pid != killed


def test_a_call_that_a_killed_process_had_is_one_clear_sentence_and_the_next_one_works(fakes):
    fakes[0].hangs_at = "/update_weights"
    server = VllmServer(fakes[0].address, "secret", timeout_s=60)
    server.health()
    process = http_process()
    threading.Timer(0.3, os.kill, (process.pid, signal.SIGKILL)).start()
    with pytest.raises(HttpProcessEnded) as error:
        server.update_weights(complete="")
    assert str(error.value) == (
        f"{server.address}: POST /update_weights: the trainer's process that speaks HTTP with the vLLM servers "
        f"(pid {process.pid}) was ended by SIGKILL, and its requests are lost: did the system run out of memory?"
    )
    server.health()


def test_a_task_begun_after_the_end_is_lost_at_once(fakes):
    server = VllmServer(fakes[0].address, timeout_s=60)
    server.health()
    process = http_process()
    os.kill(process.pid, signal.SIGKILL)
    wait_until(lambda: process.end is not None)
    with pytest.raises(HttpProcessEnded, match="was ended by SIGKILL"):
        process.begin(server._access, Ask("GET", "/health"), lambda reply: reply.head).result(10)


def sampled_though_killed(addresses: list[str]) -> tuple[list[list[int]], dict[str, float]]:
    """Kill the process behind each of two steps."""
    tokens = []
    with sampler(addresses, {}, timeout_s=30.0) as (built, _):
        for version in range(2):
            built.update_weights(version)
            tokens += [one.token_ids for one in built.generate([Request([1, version], 5)], GREEDY)]
            os.kill(http_process().pid, signal.SIGKILL)
        return tokens, built.metrics()


def test_a_sampler_goes_on_with_another_process(ranks, fakes):
    [(tokens, metrics)] = ranks.run(
        sampled_though_killed, [fake.address for fake in fakes], world_size=1, timeout=TIMEOUT
    )
    assert tokens == [tokens_behind([1, version], 4) for version in range(2)]
    assert metrics["rollout/servers_alive"] == 2


ORPHANED = """
import sys
from megatron_selfdistill.rollout.vllm.http.http_process import http_process
from megatron_selfdistill.rollout.vllm.http.http_tasks import Ask, ServerAccess
process = http_process()
hanging = process.begin(ServerAccess(0, sys.argv[1], "", 60.0), Ask("GET", "/health"), lambda reply: None)
import os
if os.fork() == 0:
    import time
    time.sleep(60)
print(process.pid, flush=True)
hanging.result()
"""


def test_it_ends_with_its_parent_also_if_the_parent_is_killed_and_has_forked(fakes):
    fakes[0].hangs_at = "/health"
    command = [sys.executable, "-c", ORPHANED, fakes[0].address]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True, start_new_session=True) as parent:
        try:
            assert parent.stdout is not None
            child = psutil.Process(int(parent.stdout.readline()))
            assert CHILD in child.cmdline()
            parent.kill()
            child.wait(20)
        finally:
            os.killpg(parent.pid, signal.SIGKILL)


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT, signal.SIGUSR1])
def test_a_signal_to_all_processes_of_a_run_does_not_end_it(fakes, number):
    server = VllmServer(fakes[0].address, timeout_s=20)
    server.health()
    pid = http_process().pid
    os.kill(pid, number)
    server.health()
    assert http_process().pid == pid


def test_no_shared_memory_and_no_descriptor_is_left_behind(fakes):
    server = VllmServer(fakes[0].address, timeout_s=60, vocab_size=50)
    server.health()
    before = psutil.Process().num_fds(), psutil.Process(http_process().pid).num_fds()
    outputs = generated(server, [EngineRequest([i], {"max_tokens": 50}) for i in range(40)])
    assert len(outputs) == 40
    child = psutil.Process(http_process().pid)
    wait_until(lambda: (psutil.Process().num_fds(), child.num_fds()) <= before)
    for pid in (os.getpid(), child.pid):
        assert "memfd:message" not in Path(f"/proc/{pid}/maps").read_text()


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


def test_a_message_keeps_its_parts_whatever_their_lengths():
    one, other = Messages.pair()
    parts = [b"head", b"", os.urandom(5_000_000), memoryview(b"end")]
    one.send(*parts)
    one.send(b"next")
    assert other.receive() == parts and other.receive() == [b"next"]
    one.close()
    assert other.receive() is None
    with pytest.raises(ConnectionError):
        other.send(b"lost")


def test_what_the_parent_does_not_read_waits_and_comes_in_order(fakes):
    """The process goes on with its requests while rank 0's interpreter is busy, however many answers there are."""
    one, other = Messages.pair()
    one.set_blocking(False)
    sent = 0
    with pytest.raises(BlockingIOError):
        while True:
            one.send(b"%d" % sent)
            sent += 1
    assert sent > 100, "far more than the answers of a moment"
    assert [bytes(other.receive()[0]) for _ in range(sent)] == [b"%d" % i for i in range(sent)]


def test_a_process_that_cannot_start_is_an_error(fakes, monkeypatch):
    monkeypatch.setattr("megatron_selfdistill.rollout.vllm.http.http_process._current", None)
    monkeypatch.setattr(sys, "executable", "/nowhere/python")
    with pytest.raises(EngineError, match=r"cannot start the process that speaks HTTP .*nowhere"):
        VllmServer(fakes[0].address).health()
