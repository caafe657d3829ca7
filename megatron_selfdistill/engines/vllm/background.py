# Copyright (c) 2026 the megatron_selfdistill authors. Apache-2.0.
"""Responses that engines generate while the trainer trains."""

from __future__ import annotations

import hashlib
import threading
import time
from collections.abc import Callable, Mapping
from types import MappingProxyType
from typing import TypeVar

from megatron_selfdistill.rollout.base import Request, Response, SamplingParams

T = TypeVar("T")

NO_RESPONSES: Mapping[str, Response] = MappingProxyType({})


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


class Arrivals:
    """The responses that a thread of this rank collects.

    ``work`` runs in the thread and calls its argument with finished responses by index, in parts; it calls no
    collective.
    """

    def __init__(
        self,
        work: Callable[[Callable[[Mapping[int, Response]], None]], None],
        known: Mapping[int, Response],
        busy_time: BusyTime,
    ) -> None:
        """Start the thread; ``known``: responses that are there already.  ``busy_time`` counts the time of ``work``."""
        self._responses = dict(known)
        self._error: BaseException | None = None
        self._changed = threading.Condition()
        self._busy_time = busy_time
        self._thread = threading.Thread(target=self._run, args=(work,), name="arrivals", daemon=True)
        self._thread.start()

    def wait_for(self, chosen: Callable[[Mapping[int, Response]], T | None]) -> T:
        """Return ``chosen`` of the finished responses as soon as it is not None; raise what ``work`` has raised."""
        with self._changed:
            while True:
                if self._error is not None:
                    raise self._error
                found = chosen(self._responses)
                if found is not None:
                    return found
                self._changed.wait()

    def join(self) -> None:
        """Wait for the end of ``work``; raise what it has raised."""
        self._thread.join()
        if self._error is not None:
            raise self._error

    def so_far(self) -> dict[int, Response]:
        """Return the finished responses."""
        with self._changed:
            return dict(self._responses)

    def _run(self, work: Callable[[Callable[[Mapping[int, Response]], None]], None]) -> None:
        try:
            with self._busy_time:
                work(self._arrived)
        except BaseException as error:
            self._error = error
        finally:
            with self._changed:
                self._changed.notify_all()

    def _arrived(self, responses: Mapping[int, Response]) -> None:
        with self._changed:
            self._responses.update(responses)
            self._changed.notify_all()


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
