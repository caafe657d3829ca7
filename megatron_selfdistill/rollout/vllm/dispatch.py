# Copyright (c) 2026 the megatron_selfdistill authors. Apache-2.0.
"""Tasks dealt over servers that may die: each is done exactly once, by whichever server has time and lives."""

from __future__ import annotations

import threading
from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from itertools import pairwise
from typing import Generic, TypeVar

from megatron_selfdistill.distributed.watchdog import beat
from megatron_selfdistill.errors import EngineError
from megatron_selfdistill.rollout.vllm.client import MAX_IN_FLIGHT, RequestRefused, VllmServer

T = TypeVar("T")
Task = Callable[[VllmServer], T]

_SHOWN = 4


@dataclass
class Dealt(Generic[T]):
    """What became of the tasks."""

    results: list[T]
    """Of each task, in order."""
    retried: int = 0
    """Tasks that a server failed at and another one did."""
    failures: dict[VllmServer, EngineError] = field(default_factory=dict)
    """Servers that failed, each with its first error."""


def deal(tasks: Sequence[Task[T]], servers: Sequence[VllmServer]) -> Dealt[T]:
    """Do every task on one of ``servers``.

    Each server starts with neighbouring tasks, since the samples of one problem share their prompt's KV cache, and one
    that has finished takes over from the one with the most left.  A task that raises `EngineError` is its server's
    fault: the server gets no further task, and others do what it had not done.

    Raises: `EngineError` naming the servers and why, when none is left; `RequestRefused`, and whatever else a task
    raises, at once.
    """
    return _Table(tasks, servers).deal() if tasks else Dealt([])


class _Table(Generic[T]):
    """What the threads share: several per server, each with one task at a time."""

    def __init__(self, tasks: Sequence[Task[T]], servers: Sequence[VllmServer]) -> None:
        self._tasks = tasks
        self._changed = threading.Condition()
        count = len(tasks)
        cuts = [count * i // len(servers) for i in range(len(servers) + 1)]
        self._queues = {
            server: deque(range(first, behind)) for server, (first, behind) in zip(servers, pairwise(cuts), strict=True)
        }
        self._in_flight = min(MAX_IN_FLIGHT, -(-count // len(servers)))
        self._results: dict[int, T] = {}
        self._failures: dict[VllmServer, EngineError] = {}
        self._retried: set[int] = set()
        self._busy = 0
        self._fatal: BaseException | None = None

    def deal(self) -> Dealt[T]:
        threads = [
            threading.Thread(target=self._work, args=(server,), name=server.address, daemon=True)
            for _ in range(self._in_flight)
            for server in self._queues  # in turn, or the first would have begun with the last's share
        ]
        try:
            for thread in threads:
                thread.start()
            with self._changed:
                self._changed.wait_for(self._is_over)
        finally:
            with self._changed:
                over = len(self._results) == len(self._tasks)
                self._fatal = self._fatal or (None if over else EngineError("given up"))
                self._changed.notify_all()
            if not over:
                for server in self._queues:
                    server.interrupt()
        if not over:
            raise self._error()
        return Dealt([self._results[i] for i in range(len(self._tasks))], len(self._retried), self._failures)

    def _is_over(self) -> bool:
        done = len(self._results) == len(self._tasks)
        nobody = len(self._failures) == len(self._queues) and self._busy == 0
        return done or nobody or self._fatal is not None

    def _error(self) -> BaseException:
        if self._failures and len(self._failures) == len(self._queues):
            causes = [str(error) for error in self._failures.values()]
            more = f"; and {len(causes) - _SHOWN} more" if len(causes) > _SHOWN else ""
            left = len(self._tasks) - len(self._results)
            return EngineError(
                f"no vLLM server is left for {left} of {len(self._tasks)} requests: {'; '.join(causes[:_SHOWN])}{more}"
            )
        assert self._fatal is not None
        return self._fatal

    def _work(self, server: VllmServer) -> None:
        while (index := self._take(server)) is not None:
            try:
                result = self._tasks[index](server)
            except RequestRefused as error:
                self._put_back(server, index, fatal=error)
            except EngineError as error:
                self._put_back(server, index, error)
            except BaseException as error:
                self._put_back(server, index, fatal=error)
            else:
                beat()
                with self._changed:
                    self._busy -= 1
                    self._results[index] = result
                    self._changed.notify_all()

    def _take(self, server: VllmServer) -> int | None:
        """A task for ``server``, as soon as there is one; None when it shall have no more."""
        with self._changed:
            while not self._is_over() and server not in self._failures:
                own = self._queues[server]
                longest = max(self._queues.values(), key=len)
                if own or longest:
                    self._busy += 1
                    return own.popleft() if own else longest.pop()
                self._changed.wait()  # one that is in flight elsewhere may come back
            return None

    def _put_back(
        self, server: VllmServer, index: int, error: EngineError | None = None, fatal: BaseException | None = None
    ) -> None:
        with self._changed:
            self._busy -= 1
            if error is not None:
                self._failures.setdefault(server, error)
                self._queues[server].append(index)
                self._retried.add(index)
            self._fatal = self._fatal or fatal
            self._changed.notify_all()
