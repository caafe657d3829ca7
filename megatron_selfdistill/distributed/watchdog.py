# Copyright (c) 2026 the megatron_selfdistill authors. Apache-2.0.
"""Signs of progress, and the end of a run in which no rank makes progress: stacks, the hanging rank's name, exit.

    with watched(rank, world_size, directory, timeout_s):
        ...                  # meanwhile: entered("train"), beat(), beat(), left("train")

The ranks exchange their signs through a store of their own, since a collective would hang like the run itself.
"""

from __future__ import annotations

import contextlib
import faulthandler
import json
import os
import socket
import sys
import threading
import time
from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import IO, Any

import psutil

from megatron_selfdistill.distributed.roll_call import launch_store, speaker
from megatron_selfdistill.distributed.signs_of_life import _signs

EXIT_HUNG = 5

# A rank whose main thread is in one of these is waiting for others.
_WAITING = ("torch.distributed", "megatron.core.pipeline_parallel.p2p_communication")
_TICKS = 20  # signs that a rank publishes per timeout
_MAX_TICK_S = 30.0
_GRACE_S = 10.0  # time in which the other ranks write their stacks
_PIECE_BYTES = 2**20  # bytes of files between two looks that count as progress; the watch itself sends fewer
# The members of this group send and receive as their stages need, so the counts of their collectives differ.
_UNEQUAL_GROUP = "PIPELINE_MODEL_PARALLEL_GROUP"


@contextlib.contextmanager
def watched(rank: int, world_size: int, directory: Path, timeout_s: float | None) -> Iterator[None]:
    """End the run if no rank makes progress for ``timeout_s`` seconds; None never ends the run.

    Every rank then appends its threads' stacks to ``directory/rank_N.txt``.  Rank 0 reports on standard error and in
    ``directory/verdict.txt`` which rank hangs, and all ranks exit with `EXIT_HUNG`.  A rank that is blocked in code
    outside Python cannot end itself: the rank still writes its stacks, and the launcher ends it with the other ranks.
    The context is no collective, but every rank of the world enters it.
    """
    if timeout_s is None:
        yield
        return
    watch = _Watch(rank, world_size, directory, timeout_s)
    watch.start()
    try:
        yield
    finally:
        watch.close()


@dataclass(frozen=True)
class Report:
    """The last signs of one rank, as the rank has published them."""

    tick: int
    """A counter that increases for as long as the rank can publish its signs."""
    stalled: bool
    """Whether there was no sign of progress for the whole timeout."""
    place: int
    phase: str
    waits: bool
    """Whether the rank's main thread is in a collective, a send or a receive."""
    host: str
    collectives: Mapping[str, int]
    """The number of collectives that a stalled rank has entered, by group."""


def hanging(reports: Mapping[int, Report | None], silent: frozenset[int]) -> dict[int, str]:
    """Return the ranks that delay the other ranks, each with the reason; empty if all ranks look alike.

    The function applies the first rule that selects a rank: ranks that no longer report (``silent``); ranks in an
    earlier phase than the other ranks; if some ranks wait in a collective, the ranks that do not wait.  If
    the last rule leaves several ranks, the function selects the ranks that have entered fewer collectives of one group
    than other ranks, and in no group more than another rank: on a GPU a rank may wait for a collective long after the
    rank has entered it.
    """
    if silent:
        return dict.fromkeys(sorted(silent), "no longer answers")
    known = {rank: report for rank, report in reports.items() if report is not None}
    first = min(report.place for report in known.values())
    behind = {rank for rank, report in known.items() if report.place == first}
    if len(behind) < len(known):
        return {rank: f"is behind the others, in phase '{known[rank].phase}'" for rank in sorted(behind)}
    alone = {rank for rank, report in known.items() if not report.waits} or set(known)
    missed = {rank: group for rank, group in _missed(known).items() if rank in alone}
    if len(alone) > 1 and missed:
        return {
            rank: f"gets nowhere in phase '{known[rank].phase}': others are in a collective of {group} without it"
            for rank, group in sorted(missed.items())
        }
    if len(alone) < len(known) or len(known) == 1:
        return {rank: f"gets nowhere in phase '{known[rank].phase}'" for rank in sorted(alone)}
    return {}


def _missed(reports: Mapping[int, Report]) -> dict[int, str]:
    """Return the ranks, each with a group, that delay a collective of the group and wait in no other collective."""
    groups: dict[str, dict[int, int]] = {}
    for rank, report in reports.items():
        for group, count in report.collectives.items():
            groups.setdefault(group, {})[rank] = count
    behind: dict[int, str] = {}
    further: set[int] = set()
    for group, counts in groups.items():
        behind |= {rank: group for rank, count in counts.items() if count < max(counts.values())}
        further |= {rank for rank, count in counts.items() if count > min(counts.values())}
    return {rank: group for rank, group in behind.items() if rank not in further}


class _Watch:
    def __init__(self, rank: int, world_size: int, directory: Path, timeout_s: float) -> None:
        self._rank, self._world_size, self._directory, self._timeout_s = rank, world_size, directory, timeout_s
        self._tick_s = min(timeout_s / _TICKS, _MAX_TICK_S)
        # torch.distributed's own connection is busy while a rank waits in a collective.
        self._store = launch_store("selfdistill/progress", world_size, max(timeout_s, 30.0))
        self._main = threading.main_thread().ident
        self._host = socket.gethostname()
        self._closing = threading.Event()
        self._thread = threading.Thread(target=self._watch, name="progress watch", daemon=True)
        # Time in which this process could run: a process that was stopped for an hour has not been hanging for an hour.
        self._clock = 0.0
        self._tick = 0
        self._count, self._moved, self._changed = -1, 0, 0.0
        self._silent: frozenset[int] = frozenset()
        self._heard: dict[int, tuple[Report | None, float]] = dict.fromkeys(range(world_size), (None, 0.0))

    def start(self) -> None:
        """Start the thread."""
        self._file = self._opened()
        self._publish(stalled=False)  # the other ranks now know this rank, even if it hangs at once
        self._thread.start()

    def close(self) -> None:
        """End the thread."""
        self._closing.set()
        self._thread.join()
        faulthandler.cancel_dump_traceback_later()
        empty = self._file.tell() == 0
        self._file.close()
        if empty:
            Path(self._file.name).unlink(missing_ok=True)
        with contextlib.suppress(OSError):  # not empty: other ranks go on, or have hung in an earlier launch
            self._directory.rmdir()
            if self._made_run_dir:
                self._directory.parent.rmdir()

    def _opened(self) -> IO[str]:
        """Open this rank's file for stacks in advance: neither C code nor a hanging run can open a file."""
        self._made_run_dir = not self._directory.parent.exists()
        while True:
            self._directory.mkdir(parents=True, exist_ok=True)
            with contextlib.suppress(FileNotFoundError):  # another rank has just closed, and removed the directory
                return (self._directory / f"rank_{self._rank}.txt").open("a")

    def _watch(self) -> None:
        before = time.monotonic()
        while True:
            # Code outside Python may block the interpreter and this thread; C code then writes the stacks.
            faulthandler.dump_traceback_later(self._timeout_s + self._tick_s, file=self._file)
            if self._closing.wait(self._tick_s):
                return
            now = time.monotonic()
            self._clock += min(now - before, 2 * self._tick_s)
            before = now
            verdict = self._verdict()
            if verdict is not None:
                self._end(verdict)  # never returns

    def _verdict(self) -> str | None:
        """Return the reason why the run must end now; None while a rank makes progress."""
        before, self._moved = self._moved, _bytes_moved() if _signs.moving_files else 0
        if _signs.count != self._count or abs(self._moved - before) >= _PIECE_BYTES:
            self._count, self._changed = _signs.count, self._clock
        stalled = self._clock - self._changed >= self._timeout_s
        try:
            self._publish(stalled)
            if self._store.check(["verdict"]):
                return str(self._store.get("verdict").decode())
            # Rank 0 judges and the other ranks read only its verdict, so that a large world exchanges little.
            ranks = range(self._world_size) if self._rank == 0 else (0,)
            self._listen(ranks)
        except RuntimeError as error:  # torch's DistError: the process that keeps the store has ended
            lost = f"{self._minutes} without progress, and the store of the ranks is gone ({error})"
            return lost if stalled else None
        if not stalled:
            return None
        patience = self._timeout_s + 2 * self._tick_s
        self._silent = frozenset(r for r in ranks if self._clock - self._heard[r][1] >= patience)
        if self._rank != 0 and not self._silent:
            return None
        reports = [self._heard[r][0] for r in ranks if r not in self._silent]
        if any(report is None or not report.stalled for report in reports):
            return None
        return self._message({r: self._heard[r][0] for r in ranks})

    def _publish(self, stalled: bool) -> None:
        self._tick += 1
        waits = stalled and _waits(self._main)
        entered = _collectives() if stalled else {}
        report = Report(self._tick, stalled, _signs.place, _signs.phase, waits, self._host, entered)
        self._store.set(f"rank {self._rank}", json.dumps(asdict(report)))

    def _listen(self, ranks: Any) -> None:
        for rank in ranks:
            if self._heard[rank][0] is None and not self._store.check([f"rank {rank}"]):
                continue  # get would wait for it
            report = Report(**json.loads(self._store.get(f"rank {rank}")))
            last = self._heard[rank][0]
            if last is None or report.tick != last.tick:
                self._heard[rank] = (report, self._clock)

    def _message(self, reports: Mapping[int, Report | None]) -> str:
        found = hanging(reports, self._silent)
        hosts = {rank: f" on {report.host}" for rank, report in reports.items() if report is not None}
        who = "; ".join(f"rank {rank}{hosts.get(rank, '')} {why}" for rank, why in found.items())
        who = who or "all ranks look alike, so none can be named"
        return (
            f"no rank has made progress for {self._minutes} (stop.hang_timeout_minutes): {who}.  The stacks of all "
            f"ranks are in {self._directory}"
        )

    @property
    def _minutes(self) -> str:
        return f"{self._timeout_s / 60:.3g} minutes"

    def _end(self, verdict: str) -> None:
        """Write the stacks and the message, and exit, since nothing else can be expected to work."""
        try:
            faulthandler.cancel_dump_traceback_later()
            print(f"{time.strftime('%F %T')}: {verdict}", file=self._file, flush=True)
            faulthandler.dump_traceback(self._file, all_threads=True)
            with contextlib.suppress(RuntimeError):
                self._store.set("verdict", verdict)
                self._store.set(f"written {self._rank}", "")
                # One rank prints for all: rank 0, or the first rank if rank 0 is silent.
                if self._store.add("reporters", 1) > 1:
                    return self._await(["reported"])
                self._await([f"written {rank}" for rank in range(self._world_size) if rank not in self._silent])
            print(f"{speaker()}{verdict}", file=sys.stderr, flush=True)
            (self._directory / "verdict.txt").write_text(verdict + "\n")
            with contextlib.suppress(RuntimeError):
                self._store.set("reported", "")
        finally:
            os._exit(EXIT_HUNG)

    def _await(self, keys: list[str]) -> None:
        deadline = time.monotonic() + min(_GRACE_S, self._timeout_s)
        while not self._store.check(keys) and time.monotonic() < deadline:
            time.sleep(min(0.1, self._tick_s))


def _waits(thread: int | None) -> bool:
    frame = sys._current_frames().get(thread or 0)
    while frame is not None:
        if str(frame.f_globals.get("__name__", "")).startswith(_WAITING):
            return True
        frame = frame.f_back
    return False


def _collectives() -> dict[str, int]:
    from torch.distributed.distributed_c10d import _world

    entered = {}
    for group, name in _world.pg_names.items():
        if group.group_desc != _UNEQUAL_GROUP:
            with contextlib.suppress(RuntimeError):  # a backend that does not count
                count: Any = group._get_sequence_number_for_group()  # type: ignore[attr-defined]
                entered[f"{group.group_desc} ({name})"] = count
    return entered


def _bytes_moved() -> int:
    """Return the bytes that this process and its living children have read and written; 0 without a count."""
    own, total = psutil.Process(), 0
    for process in (own, *own.children(recursive=True)):
        with contextlib.suppress(psutil.Error, AttributeError):  # the process has ended, or this is not Linux
            counters = process.io_counters()
            total += counters.read_chars + counters.write_chars + counters.read_bytes + counters.write_bytes
    return total
