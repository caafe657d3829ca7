# Copyright (c) 2026 the megatron_selfdistill authors. Apache-2.0.
"""Responses that arrive in waves, while the trainer already trains on those that are finished."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Protocol, TypeVar

from megatron_selfdistill.rollout.base import Request, Response, Sampler, SamplingParams

T = TypeVar("T")


@dataclass(frozen=True)
class WaveRule:
    """The rule by which finished responses become a wave."""

    group_size: int
    """Number of neighbouring requests of a replica that come in one wave: the samples of one problem."""
    min_tokens: int
    """Number of tokens, of prompts and responses, that a wave has at least on each replica that still waits for
    responses, so that no wave runs through a nearly empty pipeline."""


@dataclass(frozen=True)
class ArrivedWave:
    """The responses of a wave to the requests of this replica."""

    responses: Mapping[int, Response]
    """Whole groups, by index into the requests of this replica; empty where other replicas alone have responses."""
    share: float
    """Share of the responses of all replicas that have arrived, this wave included."""
    is_last: bool
    """Whether all responses of all replicas have arrived."""


class StreamingSampler(Sampler, Protocol):
    """A `Sampler` that returns responses while others are still being generated."""

    def stream(self, requests: Sequence[Request], params: SamplingParams, rule: WaveRule) -> Iterator[ArrivedWave]:
        """Yield the responses to ``requests`` in waves, at least one; the weights must not change before the last one.

        Each response is the one that `generate` returns.  Taking a wave is a collective; between two waves the caller
        may call other collectives, but not the sampler.
        Raises, on all ranks alike, as `generate`, when a wave is taken.
        """
        ...


def next_wave(
    requests: Sequence[Request],
    replicas: Sequence[Sequence[int]],
    finished: Mapping[int, Response],
    returned: Collection[int],
    rule: WaveRule,
) -> list[int] | None:
    """Return the indices of the responses of the next wave, or None while there are too few.

    A wave has every complete group that is not yet returned.  There is one where each replica has a wave of at least
    ``rule.min_tokens`` or waits for no more responses.
    ``requests``: those of all ``replicas``, each of which has neighbouring indices.  ``finished``: the responses so
    far, by index.  ``returned``: the indices of the earlier waves.
    """
    wave: list[int] = []
    for own in replicas:
        groups = [own[first : first + rule.group_size] for first in range(0, len(own), rule.group_size)]
        complete = [group for group in groups if all(i in finished for i in group)]
        new = [i for group in complete for i in group if i not in returned]
        num_tokens = sum(len(requests[i].prompt) + len(finished[i].token_ids) for i in new)
        if len(complete) < len(groups) and num_tokens < max(rule.min_tokens, 1):
            return None
        wave += new
    return wave


class Arrivals:
    """The responses that a thread of this rank collects.

    ``work`` runs in the thread and calls its argument with finished responses by index, in parts; it calls no
    collective.
    """

    def __init__(self, work: Callable[[Callable[[Mapping[int, Response]], None]], None]) -> None:
        """Start the thread."""
        self._responses: dict[int, Response] = {}
        self._error: BaseException | None = None
        self._changed = threading.Condition()
        self._began = time.perf_counter()
        self.seconds = 0.0
        """Seconds that ``work`` has taken, once it has ended."""
        self.waited_seconds = 0.0
        """Seconds that `wait_for` has waited in all."""
        self._thread = threading.Thread(target=self._run, args=(work,), name="arrivals", daemon=True)
        self._thread.start()

    def wait_for(self, chosen: Callable[[Mapping[int, Response]], T | None]) -> T:
        """Return ``chosen`` of the finished responses as soon as it is not None; raise what ``work`` has raised."""
        began = time.perf_counter()
        with self._changed:
            while True:
                if self._error is not None:
                    raise self._error
                found = chosen(self._responses)
                if found is not None:
                    self.waited_seconds += time.perf_counter() - began
                    return found
                self._changed.wait()

    def join(self) -> None:
        """Wait for the end of ``work``; raise what it has raised."""
        self._thread.join()
        if self._error is not None:
            raise self._error

    def of(self, indices: Sequence[int]) -> dict[int, Response]:
        """Return the responses of ``indices``, which are finished."""
        with self._changed:
            return {i: self._responses[i] for i in indices}

    def _run(self, work: Callable[[Callable[[Mapping[int, Response]], None]], None]) -> None:
        try:
            work(self._arrived)
        except BaseException as error:
            self._error = error
        finally:
            self.seconds = time.perf_counter() - self._began
            with self._changed:
                self._changed.notify_all()

    def _arrived(self, responses: Mapping[int, Response]) -> None:
        with self._changed:
            self._responses.update(responses)
            self._changed.notify_all()
