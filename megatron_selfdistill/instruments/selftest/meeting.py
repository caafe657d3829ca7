# Copyright (c) 2026 the megatron_selfdistill authors. Apache-2.0.
"""All ranks run one check after the other and share one verdict, even if some ranks raise, hang or never return.

    with Meeting(rank, world_size, broken_off=print_what_is_known) as meeting:
        outcome = meeting.hold("identity law", check, leave=parallel.shutdown)      # equal on all ranks

Ranks exchange their reports through a store and never through a collective, because a collective would hang as well.
"""

from __future__ import annotations

import contextlib
import os
import pickle
import sys
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from datetime import timedelta
from typing import Any

import torch.distributed as dist

from megatron_selfdistill.distributed.roll_call import launch_store
from megatron_selfdistill.instruments.selftest.outcome import Outcome, over_ranks

LIMIT_S = 150.0
"""The seconds for all checks together; the clock stands still during the warm-up, which has an equal limit."""
GRACE_S = 20.0
"""The seconds that the other ranks have to notice that one rank has raised."""
_POLL_S, _WATCH_S = 0.02, 0.25


@dataclass(frozen=True)
class _Report:
    """The report of one rank about a check."""

    outcome: Outcome
    failed: int
    """The order of the ranks that raised, from 1; 0 for a rank that did not raise."""


class Meeting:
    """The ranks of one launch, during all checks.

    A rank that raises leaves its process groups at once, which frees the ranks that wait for it over gloo; the message
    of this rank is the verdict.  Over NCCL no rank is freed: rank 0 calls ``broken_off`` with the known state, and a
    thread ends every process with status 1, when ``grace_s`` have passed, when a check takes longer than its share, or
    when ``limit_s`` are over.
    """

    def __init__(
        self,
        rank: int,
        world_size: int,
        broken_off: Callable[[Outcome], None],
        *,
        limit_s: float = LIMIT_S,
        grace_s: float = GRACE_S,
    ) -> None:
        """Connect this rank to the other ranks of the launch.

        ``broken_off``: called on rank 0 only, with the name of the check, or with an empty name between checks.
        ``limit_s``: the seconds of all checks from now on, by the clock of rank 0.  Ranks find each other at
        MASTER_ADDR and MASTER_PORT, where torchrun keeps a store; without torchrun rank 0 opens the store.
        """
        self.rank, self.world_size = rank, world_size
        self._broken_off, self._limit_s, self._grace_s = broken_off, limit_s, grace_s
        self._deadline = time.monotonic() + limit_s
        self._server, self._store = _stores(rank, world_size, limit_s)
        self._lock = threading.Lock()  # of the store's connection
        self._num_groups = self._num_checks = 0
        self._check: str | None = None
        self._phase = ""
        self._began = self._share_s = 0.0
        self._failure_seen: float | None = None
        self._closing = threading.Event()
        self._thread = threading.Thread(target=self._watch, name="self-test watch", daemon=True)

    def __enter__(self) -> Meeting:
        self._thread.start()
        return self

    def __exit__(self, error: Any, *_: Any) -> None:
        self._closing.set()
        self._thread.join()
        if error is not None:
            return
        with self._lock:
            self._store.set(f"gone {self.rank}", "")
        if self.rank == 0:  # rank 0 may keep the store that the other ranks still read
            deadline = time.monotonic() + self._grace_s
            everybody = [f"gone {rank}" for rank in range(self.world_size)]
            self._wait(lambda: time.monotonic() > deadline or self._has(everybody))

    def open_group(self, backend: str, timeout: timedelta) -> None:
        """Open a default process group over all ranks, under names that no earlier group had.  Collective."""
        self._num_groups += 1
        dist.init_process_group(
            backend,
            store=dist.PrefixStore(f"group {self._num_groups}", self._server),
            rank=self.rank,
            world_size=self.world_size,
            timeout=timeout,
        )

    def from_rank_0(self, name: str, value: Callable[[], str]) -> str:
        """Return ``value()`` of rank 0 on all ranks; the other ranks wait for it."""
        if self.rank == 0:
            text = value()  # before the lock, which the watch needs too
            with self._lock:
                self._store.set(name, text)
        self._wait(lambda: self._has([name]))
        with self._lock:
            return str(self._store.get(name).decode())

    def hold(self, name: str, check: Callable[[], Outcome], leave: Callable[[], None], share: float = 1.0) -> Outcome:
        """Run ``check()`` on all ranks, then ``leave()``, which ends the process groups; return the worst outcome.

        The outcome is equal on all ranks.  An exception of ``check`` on any rank becomes an outcome with the message of
        that rank.  ``share``: the part of the remaining time that this check may take; the rest is for the checks that
        follow.
        """
        self._num_checks += 1
        self._share_s = share * max(0.0, self._deadline - time.monotonic())
        self._began, self._failure_seen = time.monotonic(), None
        self._check = name  # last: the watch looks at it first
        began = time.perf_counter()
        try:
            report = _Report(check(), failed=0)
        except Exception as error:
            message = f"rank {self.rank}: {type(error).__name__}: {' '.join(str(error).split())}"
            report = _Report(Outcome(error=message), failed=self._next_failure())
        outcome = replace(report.outcome, name=name, seconds=time.perf_counter() - began)
        self._tell(replace(report, outcome=outcome))
        if not report.failed:  # a rank that is done must not close its connections while another still reads
            self._wait(lambda: self._all_have_reported() or self._any_has_failed())
        try:
            leave()
        except Exception as error:
            if not (report.failed or self._any_has_failed()):
                raise RuntimeError(f"rank {self.rank}: the process groups of '{name}' do not end: {error}") from error
        with self._lock:
            self._store.set(self._key(f"left {self.rank}"), "")
        self._wait(lambda: self._has([self._key(f"left {rank}") for rank in range(self.world_size)]))
        self._check = None
        return _joined([self._report(rank) for rank in range(self.world_size)])

    def warm_up(
        self, work: Callable[[Callable[[str], None]], None], leave: Callable[[], None], limit_s: float
    ) -> Outcome:
        """Run ``work(phase)`` on all ranks while the clock of the checks stands still, then ``leave()``.

        ``work`` calls ``phase("the phase that begins")``.  The report of a rank that does not return within ``limit_s``
        names the phase of this rank, which distinguishes a slow compiler from a collective that hangs.  The outcome is
        equal on all ranks and has no figure: it holds the seconds, and the message of a rank that raised.
        """
        left = self._deadline - time.monotonic()
        self._deadline = time.monotonic() + limit_s
        name = "warm-up"

        def check() -> Outcome:
            work(self._begin_phase)
            return Outcome(not_done="compilers and communicators are ready; no check's time is spent on them")

        try:
            return self.hold(name, check, leave)
        finally:
            self._phase = ""
            self._deadline = time.monotonic() + left

    def _begin_phase(self, phase: str) -> None:
        """Publish the phase that this rank begins, for the message about ranks that never return."""
        self._phase = phase
        with self._lock:
            self._store.set(self._key(f"phase {self.rank}"), phase)

    # -- reports that have arrived ---------------------------------------------------------------------------------

    def _key(self, what: object) -> str:
        return f"check {self._num_checks} {what}"

    def _tell(self, report: _Report) -> None:
        with self._lock:
            self._store.set(self._key(self.rank), pickle.dumps(report))

    def _has(self, keys: list[str]) -> bool:
        with self._lock:
            return bool(self._store.check(keys))

    def _all_have_reported(self) -> bool:
        return self._has([self._key(rank) for rank in range(self.world_size)])

    def _any_has_failed(self) -> bool:
        return self._has([self._key("failed")])

    def _next_failure(self) -> int:
        with self._lock:
            number = int(self._store.add(self._key("failures"), 1))
            self._store.set(self._key("failed"), "")
        return number

    def _report(self, rank: int) -> _Report:
        with self._lock:
            report: _Report = pickle.loads(self._store.get(self._key(rank)))
        return report

    def _wait(self, until: Callable[[], bool]) -> None:
        """Wait for a key of the store; the watch ends a process that would wait for ever."""
        while not until():
            time.sleep(_POLL_S)

    # -- the watch -----------------------------------------------------------------------------------------------

    def _watch(self) -> None:
        """End this process when the time is over; runs in a thread, as the main thread may hang in a collective."""
        while not self._closing.wait(_WATCH_S):
            try:
                if self._has(["broken off"]):
                    _exit()
                check = self._check
                why = self._overdue(check) if self.rank == 0 else None
            except RuntimeError:  # torch's DistError: the process with the store is gone, and with it the launch
                _exit()
            if why is not None:
                self._break_off(check, why)

    def _overdue(self, check: str | None) -> str | None:
        now = time.monotonic()
        if check is None:
            return f"did not come to it within the self-test's {self._limit_s:.0f} s" if now > self._deadline else None
        if self._failure_seen is None and self._any_has_failed():
            self._failure_seen = now
        if self._failure_seen is not None and now - self._failure_seen > self._grace_s:
            return f"did not return within {self._grace_s:g} s"
        if now - self._began > self._share_s:
            if self._phase:
                return f"did not return from the warm-up within {self._share_s:.0f} s (--minutes gives them more)"
            return f"did not return from this check within {self._share_s:.0f} s (--minutes gives them more)"
        return None

    def _break_off(self, check: str | None, why: str) -> None:
        """Report the known state and end the process: nothing else can be expected to work."""
        try:
            if check is None:  # between checks nobody waits for another
                return self._end(Outcome(error=f"rank 0 {why}"))
            ranks = range(self.world_size)
            reported = [rank for rank in ranks if self._has([self._key(rank)])]
            left = [rank for rank in ranks if self._has([self._key(f"left {rank}")])]
            # A rank that has reported may wait for others; if all have reported, some cannot end their process groups.
            missing = [r for r in ranks if r not in reported] or [r for r in ranks if r not in left]
            if not missing:
                return  # the missing reports have just arrived
            failed = sorted((r for r in map(self._report, reported) if r.failed), key=lambda report: report.failed)
            who = f"rank{'s' * (len(missing) > 1)} {', '.join(map(str, missing))} {why}{self._phases_of(missing)}"
            message = f"{failed[0].outcome.error}; then {who}" if failed else who
            seconds = time.monotonic() - self._began
            self._end(Outcome(error=message, name=check, seconds=seconds))
        except BaseException:
            _exit()

    def _phases_of(self, missing: list[int]) -> str:
        """Return the phases of the missing ranks during the warm-up; empty during a check."""
        if not self._phase:
            return ""
        at: dict[str, list[str]] = {}
        for rank in missing:
            key = self._key(f"phase {rank}")
            with self._lock:
                phase = self._store.get(key).decode() if self._store.check([key]) else "its start"
            at.setdefault(phase, []).append(str(rank))
        return "".join(
            f"; rank {ranks[0]} is at {phase}" if len(ranks) == 1 else f"; ranks {', '.join(ranks)} are at {phase}"
            for phase, ranks in at.items()
        )

    def _end(self, outcome: Outcome) -> None:
        self._broken_off(outcome)
        with self._lock, contextlib.suppress(RuntimeError):
            self._store.set("broken off", outcome.error)
        time.sleep(4 * _WATCH_S)  # the other ranks read the report, which this process may keep in its store
        _exit()


def _exit() -> None:
    """End the process, whatever the main thread does; printed lines are not lost."""
    flushing = threading.Thread(target=sys.stdout.flush, daemon=True)
    flushing.start()
    flushing.join(1.0)
    os._exit(1)


def _joined(reports: list[_Report]) -> Outcome:
    failed = sorted((report for report in reports if report.failed), key=lambda report: report.failed)
    if not failed:
        return over_ranks([report.outcome for report in reports])
    first, others = failed[0].outcome, len(failed) - 1
    more = f"; afterwards {others} other{'s' * (others > 1)} failed" if others else ""
    return replace(first, error=first.error + more, seconds=max(report.outcome.seconds for report in reports))


def _stores(rank: int, world_size: int, limit_s: float) -> tuple[Any, Any]:
    """Return the store that groups are opened with, and a separate connection for this module."""
    timeout_s = max(limit_s, 60.0)
    server = launch_store("selfdistill/selftest", world_size, timeout_s, may_keep=rank == 0)
    return server, server if world_size == 1 else launch_store("selfdistill/selftest", world_size, timeout_s)
