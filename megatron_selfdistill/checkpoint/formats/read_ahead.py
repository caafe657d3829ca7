# Copyright (c) 2026 the megatron_selfdistill authors. Apache-2.0.
"""Two threads for a conversion: one makes the next tensor while the other writes the present one."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from typing import TypeVar

T = TypeVar("T")
R = TypeVar("R")


def read_ahead(items: Sequence[T], make: Callable[[T], R], num_bytes: Callable[[T], int]) -> Iterator[R]:
    """Yield ``make(item)`` of each item in order; all are made in one thread of their own, one after the other.

    The next result is made while the caller uses the present one, but only where ``num_bytes`` of the present one and
    twice that of the next (its inputs and itself) stay within twice the largest: elsewhere the caller must have dropped
    the present result when it asks for the next.  What ``make`` raises is raised here.
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
