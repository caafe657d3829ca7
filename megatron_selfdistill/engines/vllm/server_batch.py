# Copyright (c) 2026 the megatron_selfdistill authors. Apache-2.0.
"""A batch of requests that vLLM servers answer in a thread of rank 0, while the trainer may do something else."""

from __future__ import annotations

import threading
from collections import deque
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import Future
from dataclasses import dataclass
from itertools import pairwise
from queue import SimpleQueue
from typing import TypeVar

from megatron_selfdistill.distributed.signs_of_life import beat
from megatron_selfdistill.engines.vllm.background import Arrivals, BusyTime
from megatron_selfdistill.engines.vllm.client import RequestRefused, VllmServer
from megatron_selfdistill.engines.vllm.coroutines import Work, begin
from megatron_selfdistill.engines.vllm.engine import engine_request
from megatron_selfdistill.engines.vllm.exchange import GatheredRequests, WeightAge
from megatron_selfdistill.errors import EngineError, first_few
from megatron_selfdistill.rollout.base import Request, Response, SamplingParams

MAX_IN_FLIGHT = 512
"""Number of the requests of a batch that one server works on at once."""

T = TypeVar("T")
Task = Callable[[VllmServer], Work[T]]
"""A coroutine function that lets a server do the task."""


@dataclass(frozen=True)
class DispatchResult:
    """What has happened while servers did all tasks."""

    num_retried: int
    """Number of tasks that were begun again, since a server failed at them."""
    failures: dict[VllmServer, EngineError]
    """The first error of each server that failed."""


def dispatch(
    tasks: Sequence[Task[T]], servers: Sequence[VllmServer], arrived: Callable[[int, T], None]
) -> DispatchResult:
    """Do every task on one of ``servers``.

    Each server starts with neighbouring tasks, since the samples of one problem share the KV cache of their prompt.  A
    server that has finished its tasks takes tasks from the server that has most left.  An `EngineError` of a task is
    the failure of its server: the server gets no further task, and the other servers do its tasks.  ``arrived`` is
    called with the index of each task and its result as it comes, on the caller's thread.

    Raises: `EngineError` that names the servers and their errors when no server is left; `RequestRefused`, and any
    other error of a task, at once.
    """
    if not tasks:
        return DispatchResult(0, {})
    cuts = [len(tasks) * i // len(servers) for i in range(len(servers) + 1)]
    waiting = {server: deque(range(first, end)) for server, (first, end) in zip(servers, pairwise(cuts), strict=True)}
    num_at_once = min(MAX_IN_FLIGHT, -(-len(tasks) // len(servers)))  # per server
    idle = deque([*servers] * num_at_once)  # servers in turn, so that each of them begins with its own tasks
    running: dict[Future[T], tuple[VllmServer, int]] = {}
    finished: SimpleQueue[Future[T]] = SimpleQueue()
    num_done = 0
    retried: set[int] = set()
    failures: dict[VllmServer, EngineError] = {}
    try:
        while num_done < len(tasks):
            while idle and any(waiting.values()):
                server = idle.popleft()
                if server not in failures:
                    index = waiting[server].popleft() if waiting[server] else max(waiting.values(), key=len).pop()
                    future = begin(tasks[index](server))
                    running[future] = server, index
                    future.add_done_callback(finished.put)
            if not running:
                raise _no_server_left(len(tasks) - num_done, len(tasks), failures)
            future = finished.get()
            server, index = running.pop(future)
            try:
                result = future.result()
            except RequestRefused:
                raise
            except EngineError as error:
                failures.setdefault(server, error)
                waiting[server].append(index)
                retried.add(index)
            else:
                num_done += 1
                beat()
                arrived(index, result)
                idle.append(server)
    except BaseException:
        for server in servers:
            server.interrupt()
        raise
    return DispatchResult(len(retried), failures)


def _no_server_left(num_left: int, num_tasks: int, failures: dict[VllmServer, EngineError]) -> EngineError:
    causes = [str(error) for error in failures.values()]
    return EngineError(f"no vLLM server is left for {num_left} of {num_tasks} requests: {first_few(causes)}")


@dataclass(frozen=True)
class Ticket:
    """A batch of requests that servers work on."""

    gathered: GatheredRequests
    batch: ServerBatch | None
    """The work itself, on rank 0; None on the other ranks."""


class ServerBatch:
    """Requests that servers answer in a thread of this process."""

    def __init__(
        self,
        requests: Sequence[Request],
        params: SamplingParams,
        age: WeightAge,
        servers: Sequence[VllmServer],
        known: Mapping[int, Response],
        busy_time: BusyTime,
    ) -> None:
        """Begin the work, which calls no collective.

        ``servers``: those with weights of the age; the list is empty where every response is ``known``, by index.
        ``busy_time`` counts the time of the work.
        """
        self.requests, self.params = requests, params
        self._age, self._servers = age, servers
        self._todo = [i for i in range(len(requests)) if i not in known]
        self._cancelled = threading.Event()
        self.dispatched = DispatchResult(0, {})
        """What has happened on the way, once the batch is finished."""
        self.arrivals = Arrivals(self._answer, known, busy_time)
        """The responses so far."""

    def cancel(self) -> None:
        """Begin no further request; the caller interrupts those that servers work on."""
        self._cancelled.set()

    def _answer(self, arrived: Callable[[Mapping[int, Response]], None]) -> None:
        """Let the servers answer; call ``arrived`` with the responses by index, as they come."""
        if not self._todo:
            return
        tasks = [self._task(self.requests[i]) for i in self._todo]
        self.dispatched = dispatch(tasks, self._servers, lambda task, response: arrived({self._todo[task]: response}))

    def _task(self, request: Request) -> Task[Response]:
        """Return the task of one server: the response to ``request``."""

        async def answer(server: VllmServer) -> Response:
            if self._cancelled.is_set():
                raise EngineError(f"{server.address}: given up, since the sampler was closed")
            response = await server.generate(engine_request(request, self.params))
            self._age.require(response.weight_version, server.name)
            return response

        return answer
