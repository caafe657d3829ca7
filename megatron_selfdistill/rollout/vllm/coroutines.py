# Copyright (c) 2026 the megatron_selfdistill authors. Apache-2.0.
"""Coroutines that wait for futures; any number of them need no thread and no event loop.

async def two_steps(server: VllmServer) -> None:
    await server.calls.pause()
    await server.calls.resume()

futures = [begin(two_steps(server)) for server in servers]
"""

from __future__ import annotations

import functools
import types
from collections.abc import Coroutine, Generator
from concurrent.futures import Future
from typing import Any, TypeVar

T = TypeVar("T")

Work = Coroutine[Future[Any], None, T]
"""A coroutine that awaits `result_of` futures and other such coroutines, and nothing else."""


@types.coroutine
def result_of(future: Future[T]) -> Generator[Future[T], None, T]:
    """Wait for ``future`` within a coroutine that `begin` runs; return its result, or raise its exception."""
    yield future
    return future.result()


def begin(work: Work[T]) -> Future[T]:
    """Run ``work`` until it waits for a future, and return its result to come.

    ``work`` goes on in the thread that completes the future, so it may compute there but must not block.  One coroutine
    never runs in two threads at once; two coroutines may.
    """
    result: Future[T] = Future()
    _go_on(work, result)
    return result


def run(work: Work[T]) -> T:
    """Run ``work``, and return its result when it has ended; not within a coroutine, which must not block."""
    return begin(work).result()


def _go_on(work: Work[T], result: Future[T], _: Future[Any] | None = None) -> None:
    """Run ``work`` until it waits again, or ends with ``result``; the last argument is the future that it had."""
    try:
        awaited = work.send(None)
    except StopIteration as end:
        result.set_result(end.value)
    except BaseException as error:
        result.set_exception(error)
        if not isinstance(error, Exception):
            raise  # Ctrl-C: it is meant for this thread
    else:
        awaited.add_done_callback(functools.partial(_go_on, work, result))
