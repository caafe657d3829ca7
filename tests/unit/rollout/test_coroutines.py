# Copyright (c) 2026 the megatron_selfdistill authors. Apache-2.0.
"""Coroutines on futures: they need no thread, lose no result, and leave nothing behind."""

from __future__ import annotations

import gc
import threading
import weakref
from concurrent.futures import Future

import pytest

from megatron_selfdistill.rollout.vllm.coroutines import begin, result_of, run


async def added(one: Future[int], other: Future[int]) -> int:
    return await result_of(one) + await result_of(other)


async def doubled(one: Future[int], other: Future[int]) -> int:
    return 2 * await added(one, other)


@pytest.mark.parametrize("first", [0, 1])
def test_a_result_comes_with_the_last_future_in_whatever_order(first):
    futures: list[Future[int]] = [Future(), Future()]
    result = begin(doubled(*futures))
    futures[first].set_result(3)
    assert not result.done()
    futures[1 - first].set_result(4)
    assert result.result(0) == 14 == run(doubled(*futures))


def test_a_thousand_that_wait_take_no_thread():
    before, futures = threading.active_count(), [(Future[int](), Future[int]()) for _ in range(1000)]
    results = [begin(added(*pair)) for pair in futures]
    assert threading.active_count() == before
    for i, pair in enumerate(futures):
        for future in pair:
            future.set_result(i)
    assert [result.result(0) for result in results] == [2 * i for i in range(1000)]


async def mended(future: Future[int]) -> int:
    try:
        return await result_of(future)
    except KeyError:
        return 0


def test_an_exception_is_raised_where_the_coroutine_waits():
    futures: list[Future[int]] = [Future(), Future()]
    results = [begin(mended(futures[0])), begin(mended(futures[1]))]
    futures[0].set_exception(KeyError("lost"))
    futures[1].set_exception(OSError("gone"))
    assert results[0].result(0) == 0
    with pytest.raises(OSError, match="gone"):
        results[1].result(0)


async def interrupted() -> None:
    raise KeyboardInterrupt


def test_ctrl_c_reaches_the_thread_in_which_a_coroutine_runs():
    with pytest.raises(KeyboardInterrupt):
        begin(interrupted())


class Response:
    """A result that a weak reference can watch."""


async def answered(future: Future[int]) -> Response:
    await result_of(future)
    return Response()


def test_a_result_that_nobody_holds_is_freed_at_once():
    """Training collects cycles seldom, and the responses of a batch are large."""
    future: Future[int] = Future()
    result = begin(answered(future))
    future.set_result(1)
    watched = weakref.ref(result.result(0))
    assert watched() is not None
    gc.disable()
    try:
        del result, future
        assert watched() is None
    finally:
        gc.enable()
