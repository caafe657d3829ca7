# Copyright (c) 2026 the megatron_selfdistill authors. Apache-2.0.
"""A batch of requests that vLLM servers answer in a thread of rank 0, while the trainer may do something else."""

from __future__ import annotations

import hashlib
import threading
import time
from collections import deque
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import Future
from dataclasses import dataclass
from itertools import pairwise
from queue import SimpleQueue
from typing import TypeVar

from megatron_selfdistill.distributed.signs_of_life import beat
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


def dispatch(
    tasks: Sequence[Task[T]], servers: Sequence[VllmServer], arrived: Callable[[int, T], None]
) -> tuple[int, dict[VllmServer, EngineError]]:
    """Do every task on one of ``servers``; return the number of retried tasks, and the first error of each lost server.

    Each server starts with neighbouring tasks, since the samples of one problem share the KV cache of their prompt.  A
    server that has finished its tasks takes tasks from the server that has most left.  An `EngineError` of a task is
    the failure of its server: the server gets no further task, and the other servers do its tasks.  ``arrived`` is
    called with the index of each task and its result as it comes, on the caller's thread.

    Raises: `EngineError` that names the servers and their errors when no server is left; `RequestRefused`, and any
    other error of a task, at once.
    """
    if not tasks:
        return 0, {}
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
                causes = first_few([str(error) for error in failures.values()])
                raise EngineError(
                    f"no vLLM server is left for {len(tasks) - num_done} of {len(tasks)} requests: {causes}"
                )
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
    return len(retried), failures


class BusyTime:
    """The time in which work is under way, in any number of threads at once: each work is a ``with`` statement."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._num_under_way = 0
        self._seconds = 0.0
        self._since = 0.0

    def __enter__(self) -> None:
        with self._lock:
            if self._num_under_way == 0:
                self._since = time.perf_counter()
            self._num_under_way += 1

    def __exit__(self, *error: object) -> None:
        with self._lock:
            self._num_under_way -= 1
            if self._num_under_way == 0:
                self._seconds += time.perf_counter() - self._since

    def take(self) -> float:
        """Return the seconds since the last call in which at least one work was under way."""
        with self._lock:
            now, seconds = time.perf_counter(), self._seconds
            if self._num_under_way:
                seconds += now - self._since
            self._seconds, self._since = 0.0, now
            return seconds


def request_key(request: Request, params: SamplingParams) -> str:
    """Return a name of ``request`` that another process also gives it: equal names have equal responses' distributions.

    The name is a BLAKE2b digest of the seed, the prompts and the parameters, without the target of guided requests.
    """
    drawn: list[object] = [
        params.max_new_tokens,
        params.temperature,
        params.top_k,
        params.top_p,
        *params.stop_token_ids,
    ]
    drawn += [] if params.num_ids is None else [f"ids {params.num_ids}"]
    name = repr((request.seed, request.prompt, request.teacher_prompt, 0, drawn))  # 0: as in checkpoints of before
    return hashlib.blake2b(name.encode(), digest_size=16).hexdigest()


@dataclass(frozen=True)
class Ticket:
    """A batch of requests that servers work on."""

    gathered: GatheredRequests
    batch: ServerBatch | None
    """The work itself, on rank 0; None on the other ranks."""


class ServerBatch:
    """Requests that servers answer in a thread of this process, which calls no collective."""

    def __init__(
        self,
        requests: Sequence[Request],
        params: SamplingParams,
        age: WeightAge,
        servers: Sequence[VllmServer],
        known: Mapping[int, Response],
        busy_time: BusyTime,
    ) -> None:
        """Begin the work.

        ``servers``: those with weights of the age; the list is empty where every response is ``known``, by index.
        ``busy_time`` counts the time of the work.
        """
        self.requests, self.params = requests, params
        self._age, self._servers, self._busy_time = age, servers, busy_time
        self._cancelled = threading.Event()
        self._responses = dict(known)
        self._error: BaseException | None = None
        self._changed = threading.Condition()
        self.num_retried = 0
        """The number of requests that were begun again, once the batch is finished."""
        self.failures: dict[VllmServer, EngineError] = {}
        """The first error of each server that was lost on the way."""
        self._thread = threading.Thread(target=self._run, name="server batch", daemon=True)
        self._thread.start()

    def cancel(self) -> None:
        """Begin no further request; the caller interrupts those that servers work on."""
        self._cancelled.set()

    def wait_for(self, chosen: Callable[[Mapping[int, Response]], T | None]) -> T:
        """Return ``chosen`` of the responses so far as soon as it is not None; raise what the work has raised."""
        with self._changed:
            while True:
                if self._error is not None:
                    raise self._error
                found = chosen(self._responses)
                if found is not None:
                    return found
                self._changed.wait()

    def join(self) -> None:
        """Wait for the end of the work; raise what it has raised."""
        self._thread.join()
        if self._error is not None:
            raise self._error

    def so_far(self) -> dict[int, Response]:
        """Return the responses so far, by index."""
        with self._changed:
            return dict(self._responses)

    def _run(self) -> None:
        todo = [i for i in range(len(self.requests)) if i not in self._responses]

        def arrived(task: int, response: Response) -> None:
            with self._changed:
                self._responses[todo[task]] = response
                self._changed.notify_all()

        try:
            with self._busy_time:
                tasks = [self._task(self.requests[i]) for i in todo]
                self.num_retried, self.failures = dispatch(tasks, self._servers, arrived)
        except BaseException as error:
            self._error = error
        finally:
            with self._changed:
                self._changed.notify_all()

    def _task(self, request: Request) -> Task[Response]:

        async def answer(server: VllmServer) -> Response:
            if self._cancelled.is_set():
                raise EngineError(f"{server.address}: given up, since the sampler was closed")
            response = await server.generate(engine_request(request, self.params))
            self._age.require(response.weight_version, server.name)
            return response

        return answer
