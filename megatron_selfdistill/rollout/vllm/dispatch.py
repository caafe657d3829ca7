# Copyright (c) 2026 the megatron_selfdistill authors. Apache-2.0.
"""Distribute tasks over servers that may fail: each task is done exactly once, by a server that works."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from itertools import pairwise
from queue import SimpleQueue
from typing import Generic, TypeVar

from megatron_selfdistill.distributed.watchdog import beat
from megatron_selfdistill.errors import EngineError, first_few
from megatron_selfdistill.rollout.vllm.client import MAX_IN_FLIGHT, RequestRefused, VllmServer

T = TypeVar("T")
Task = Callable[[VllmServer], T]


@dataclass(frozen=True)
class DispatchResult(Generic[T]):
    """The results of all tasks, and the servers that failed on the way."""

    results: list[T]
    """The result of each task, in the order of the tasks."""
    num_retried: int
    """Number of tasks at which a server failed before another server did them."""
    failures: dict[VllmServer, EngineError]
    """The first error of each server that failed."""


def dispatch(
    tasks: Sequence[Task[T]],
    servers: Sequence[VllmServer],
    arrived: Callable[[int, T], None] = lambda index, result: None,
) -> DispatchResult[T]:
    """Do every task on one of ``servers`` and return the results.

    Each server starts with neighbouring tasks, since the samples of one problem share the KV cache of their prompt.  A
    server that has finished its tasks takes tasks from the server that has most left.  An `EngineError` of a task is
    the failure of its server: the server gets no further task, and the other servers do its tasks.  ``arrived`` is
    called with the index of each task and its result as it comes, on the caller's thread.

    Raises: `EngineError` that names the servers and their errors when no server is left; `RequestRefused`, and any
    other error of a task, at once.
    """
    if not tasks:
        return DispatchResult([], 0, {})
    cuts = [len(tasks) * i // len(servers) for i in range(len(servers) + 1)]
    waiting = {server: deque(range(first, end)) for server, (first, end) in zip(servers, pairwise(cuts), strict=True)}
    num_threads = min(MAX_IN_FLIGHT, -(-len(tasks) // len(servers)))  # per server
    idle = deque([*servers] * num_threads)  # servers in turn, so that each of them begins with its own tasks
    running: dict[Future[T], tuple[VllmServer, int]] = {}
    finished: SimpleQueue[Future[T]] = SimpleQueue()
    results: dict[int, T] = {}
    retried: set[int] = set()
    failures: dict[VllmServer, EngineError] = {}
    threads = ThreadPoolExecutor(num_threads * len(servers), thread_name_prefix="task")
    try:
        while len(results) < len(tasks):
            while idle and any(waiting.values()):
                server = idle.popleft()
                if server not in failures:
                    index = waiting[server].popleft() if waiting[server] else max(waiting.values(), key=len).pop()
                    future = threads.submit(tasks[index], server)
                    running[future] = server, index
                    future.add_done_callback(finished.put)
            if not running:
                raise _no_server_left(len(tasks) - len(results), len(tasks), failures)
            future = finished.get()
            server, index = running.pop(future)
            try:
                results[index] = future.result()
            except RequestRefused:
                raise
            except EngineError as error:
                failures.setdefault(server, error)
                waiting[server].append(index)
                retried.add(index)
            else:
                beat()
                arrived(index, results[index])
                idle.append(server)
    except BaseException:
        for server in servers:
            server.interrupt()
        raise
    finally:
        threads.shutdown(wait=False, cancel_futures=True)
    return DispatchResult([results[i] for i in range(len(tasks))], len(retried), failures)


def _no_server_left(num_left: int, num_tasks: int, failures: dict[VllmServer, EngineError]) -> EngineError:
    causes = [str(error) for error in failures.values()]
    return EngineError(f"no vLLM server is left for {num_left} of {num_tasks} requests: {first_few(causes)}")
