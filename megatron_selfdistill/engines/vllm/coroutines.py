# Copyright (c) 2026 the megatron_selfdistill authors. Apache-2.0.
"""The thread of this process in which coroutines wait for vLLM servers; one event loop runs any number of them."""

from __future__ import annotations

import asyncio
import os
import resource
import threading
from collections.abc import Coroutine
from concurrent.futures import Future
from typing import Any, TypeVar

T = TypeVar("T")

Work = Coroutine[Any, Any, T]
"""A coroutine of the event loop; it may compute, but must not block."""

_under_way: set[asyncio.Task[None]] = set()  # an event loop does not hold its tasks
_loops: dict[int, asyncio.AbstractEventLoop] = {}  # by the id of the process, since a fork has no such thread
_starting = threading.Lock()


def begin(work: Work[T]) -> Future[T]:
    """Run ``work`` in the thread of the event loop, and return its result to come."""
    # asyncio.run_coroutine_threadsafe leaves a cycle, which would keep the result for long.
    result: Future[T] = Future()
    loop = _loop()

    def start() -> None:
        task = loop.create_task(_carry(work, result))
        _under_way.add(task)
        task.add_done_callback(_under_way.discard)

    loop.call_soon_threadsafe(start)
    return result


def run(work: Work[T]) -> T:
    """Run ``work``, and return its result when it has ended; not within a coroutine, which must not block."""
    return begin(work).result()


async def _carry(work: Work[T], result: Future[T]) -> None:
    """Complete ``result`` with what ``work`` returns or raises."""
    try:
        result.set_result(await work)
    except BaseException as error:
        result.set_exception(error)
    finally:
        del result  # the traceback of an error keeps this frame


def _loop() -> asyncio.AbstractEventLoop:
    """Return the event loop of this process; the first call starts its thread."""
    with _starting:
        loop = _loops.get(os.getpid())
        if loop is None:
            _, most = resource.getrlimit(resource.RLIMIT_NOFILE)
            resource.setrlimit(resource.RLIMIT_NOFILE, (most, most))  # each request has a connection
            loop = _loops[os.getpid()] = asyncio.new_event_loop()
            threading.Thread(target=loop.run_forever, name="vllm-servers", daemon=True).start()
        return loop
