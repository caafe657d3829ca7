# Copyright (c) 2026 the megatron_selfdistill authors. Apache-2.0.
"""Responses that engines generate while the trainer trains: in partial batches, or ahead of the step."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass
from types import MappingProxyType
from typing import Protocol, TypeVar

from megatron_selfdistill.rollout.base import Request, Response, Sampler, SamplingParams

T = TypeVar("T")
TicketT = TypeVar("TicketT")

NO_RESPONSES: Mapping[str, Response] = MappingProxyType({})


@dataclass(frozen=True)
class PartialBatchRule:
    """The rule by which finished responses become a partial batch."""

    group_size: int
    """Number of neighbouring requests of a replica that come in one partial batch: the samples of one problem."""
    min_tokens: int
    """Number of tokens, of prompts and responses, that a partial batch has at least on each replica that still waits
    for responses, so that no partial batch runs through a nearly empty pipeline."""


@dataclass(frozen=True)
class ArrivedBatch:
    """The responses of a partial batch to the requests of this replica."""

    responses: Mapping[int, Response]
    """Whole groups, by index into the requests of this replica; empty where other replicas alone have responses."""
    share: float
    """Share of the responses of all replicas that have arrived, this partial batch included."""
    is_last: bool
    """Whether all responses of all replicas have arrived."""


class StreamingSampler(Sampler, Protocol[TicketT]):
    """A `Sampler` whose engines generate while the trainer does something else.

    Any number of batches may be under way at once.  Each method is a collective over the world unless it says
    otherwise.
    """

    def start(
        self,
        requests: Sequence[Request],
        params: SamplingParams,
        used_at: int,
        known: Mapping[str, Response] = NO_RESPONSES,
    ) -> TicketT:
        """Let the engines begin with ``requests``, by the weights of the last `update_weights`, and return at once.

        ``used_at``: the version of the student that will be trained on the responses.  ``known``: responses from a
        checkpoint, by `request_key`; their requests are not generated again.
        Raises, on all ranks alike, as `generate`.
        """
        ...

    def stream(self, ticket: TicketT, rule: PartialBatchRule) -> Iterator[ArrivedBatch]:
        """Yield the responses to the requests of ``ticket`` in partial batches, at least one.

        Between two partial batches the caller may call other collectives, also of this sampler.
        Raises, on all ranks alike, as `generate`, when a partial batch is taken.
        """
        ...

    def collect(self, ticket: TicketT) -> list[Response]:
        """Return the responses to the requests of ``ticket``, as `generate` returns them."""
        ...

    def settle(self) -> None:
        """Return once all responses under way are finished.  Raises, on all ranks alike, as `generate`."""
        ...

    def finished(self, ticket: TicketT) -> dict[str, Response]:
        """Return the responses of all replicas so far, by `request_key`, on rank 0; no collective."""
        ...


def next_partial_batch(
    requests: Sequence[Request],
    replicas: Sequence[Sequence[int]],
    finished: Mapping[int, Response],
    returned: Collection[int],
    rule: PartialBatchRule,
) -> list[int] | None:
    """Return the indices of the responses of the next partial batch, or None while there are too few.

    A partial batch has every complete group that is not yet returned.  There is one where each replica has a partial
    batch of at least ``rule.min_tokens`` or waits for no more responses.
    ``requests``: those of all ``replicas``, each of which has neighbouring indices.  ``finished``: the responses so
    far, by index.  ``returned``: the indices of the earlier partial batches.
    """
    partial_batch: list[int] = []
    for own in replicas:
        groups = [own[first : first + rule.group_size] for first in range(0, len(own), rule.group_size)]
        complete = [group for group in groups if all(i in finished for i in group)]
        new = [i for group in complete for i in group if i not in returned]
        num_tokens = sum(len(requests[i].prompt) + len(finished[i].token_ids) for i in new)
        if len(complete) < len(groups) and num_tokens < max(rule.min_tokens, 1):
            return None
        partial_batch += new
    return partial_batch


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

    def of(self, indices: Sequence[int]) -> dict[int, Response]:
        """Return the responses of ``indices``, which are finished."""
        with self._changed:
            return {i: self._responses[i] for i in indices}

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
