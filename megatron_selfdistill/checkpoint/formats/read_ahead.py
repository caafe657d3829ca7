# Copyright (c) 2026 the megatron_selfdistill authors. Apache-2.0.
"""Overlap the two halves of a conversion: a thread makes the next tensor while the caller writes the present one."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from typing import TypeVar

T = TypeVar("T")
R = TypeVar("R")


def read_ahead(items: Sequence[T], make: Callable[[T], R], num_bytes: Callable[[T], int]) -> Iterator[R]:
    """Yield ``make(item)`` of each item in order; another thread makes the results one after the other.

    The thread makes the next result while the caller uses the present result, if memory allows: ``num_bytes`` of the
    present result, plus twice that of the next result (its inputs and itself), is at most twice the largest
    ``num_bytes``.  Else the thread starts when the caller, which must have dropped the present result, asks for the
    next result.  The function raises the exceptions of ``make``.
    """
    room = 2 * max(map(num_bytes, items), default=0)
    ahead: Future[R] | None = None
    with ThreadPoolExecutor(1, thread_name_prefix="read ahead") as pool:
        for item, following in zip(items, [*items[1:], None], strict=True):
            made = [(ahead or pool.submit(make, item)).result()]
            ahead = None
            if following is not None and num_bytes(item) + 2 * num_bytes(following) <= room:
                ahead = pool.submit(make, following)
            yield made.pop()  # no reference stays here
