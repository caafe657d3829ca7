# Copyright (c) 2026 the megatron_selfdistill authors. Apache-2.0.
"""The thread of the event loop: it runs all coroutines, loses no result, and leaves nothing behind."""

from __future__ import annotations

import asyncio
import threading
from concurrent.futures import Future

import pytest
from forks import in_a_fork

from megatron_selfdistill.engines.vllm.coroutines import begin, run


async def waited(future: Future[int]) -> int:
    return await asyncio.wrap_future(future)


def test_a_thousand_that_wait_take_one_thread():
    futures: list[Future[int]] = [Future() for _ in range(1000)]
    run(asyncio.sleep(0))
    before = threading.active_count()
    results = [begin(waited(future)) for future in futures]
    assert threading.active_count() <= before
    for i, future in enumerate(futures):
        future.set_result(i)
    assert [result.result() for result in results] == list(range(1000))


@pytest.mark.parametrize("error", [OSError("gone"), KeyboardInterrupt("pressed"), SystemExit(3)])
def test_whatever_a_coroutine_raises_its_caller_gets_it_and_the_thread_goes_on(error):
    future: Future[int] = Future()
    result = begin(waited(future))
    future.set_exception(error)
    with pytest.raises(type(error), match=str(error)):
        result.result()
    assert run(asyncio.sleep(0, 7)) == 7


def computed() -> None:
    assert run(asyncio.sleep(0, 7)) == 7


def test_a_fork_has_a_thread_of_its_own():
    computed()
    assert in_a_fork(computed, seconds=300) == (0, "")
