# Copyright (c) 2026 the megatron_selfdistill authors. Apache-2.0.
"""The end of a run before its last step, asked for by SIGUSR1, SIGTERM or Ctrl-C, or forced by the end of its time.

    with listening():                            # before torch is imported: a signal that comes earlier is lost
        with interruptible():
            stop = Stop(run_dir, grid, ...)
            while steps are left and not stop.agreed():
                ...
            save a checkpoint
            stop.leave_marker(step)

SIGUSR1, SIGTERM and the first Ctrl-C (SIGINT) only set a flag, so no signal interrupts a step or a save.  The second
Ctrl-C ends the process at once, even if the process waits in code outside Python.
"""

from __future__ import annotations

import contextlib
import os
import re
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from megatron_selfdistill.distributed.roll_call import speaker, world_size
from megatron_selfdistill.errors import OF_ALL_RANKS

if TYPE_CHECKING:
    from megatron_selfdistill.distributed.ranks import RankGrid

MARKER = "stopped"
"""The file in the run directory which says that the run has stopped, saved a checkpoint and can be started again."""

SIGNALS = (signal.SIGUSR1, signal.SIGTERM)
EXIT_INTERRUPTED = 128 + signal.SIGINT
_TIME_IS_UP = 1000  # a number above all signals
_SQUEUE_SECONDS = 60.0
# A launcher may pass on a Ctrl-C that the terminal has already sent to its ranks.
_SAME_PRESS_S = 0.5
_THE_END = b"\0"  # no signal's number; a forked process may hold the pipe open, so closing it would end nothing

_began = time.monotonic()  # this module is among the first that a run imports
_received: set[int] = set()


@contextlib.contextmanager
def listening() -> Iterator[None]:
    """Record each of `SIGNALS` instead of ending the process.  Only the main thread may enter this context."""
    _received.clear()
    before = {number: signal.signal(number, _take_note) for number in SIGNALS}
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, signal.SIG_DFL if handler is None else handler)
        _received.clear()


def ignore_signals() -> None:
    """Ignore `SIGNALS` from now on, outside of `listening`."""
    for number in SIGNALS:
        signal.signal(number, signal.SIG_IGN)


def how_ended(code: int | None) -> str:
    """Return how a process with the exit code ``code`` of Python's modules has ended: by its signal, or its status."""
    return f"signal {signal.Signals(-code).name}" if code is not None and code < 0 else f"status {code}"


def asked() -> bool:
    """Return whether a signal within `listening` has asked this process to end; not a collective."""
    return bool(_received)


def _take_note(number: int, frame: Any) -> None:
    _received.add(number)


@contextlib.contextmanager
def interruptible() -> Iterator[None]:
    """Let the first Ctrl-C act like SIGTERM, and let the second Ctrl-C end the process with `EXIT_INTERRUPTED`.

    torchrun answers a second Ctrl-C with SIGTERM, so SIGTERM after a Ctrl-C counts as the second Ctrl-C under torchrun.
    Rank 0 prints a line at each Ctrl-C.  Only the main thread may enter this context.
    """
    reader, writer = os.pipe()
    os.set_blocking(writer, False)
    handler = signal.signal(signal.SIGINT, _take_note)
    # Python runs its handlers between two instructions of the main thread, which may wait in a collective for long.
    # The number of a signal arrives here at once.
    wakeup = signal.set_wakeup_fd(writer, warn_on_full_buffer=False)
    _own_wakeups.append(writer)
    presses = threading.Thread(target=_count_presses, args=(reader,), name="Ctrl-C", daemon=True)
    presses.start()
    try:
        yield
    finally:
        signal.set_wakeup_fd(wakeup)
        _own_wakeups.remove(writer)
        signal.signal(signal.SIGINT, signal.SIG_DFL if handler is None else handler)
        os.write(writer, _THE_END)
        presses.join()
        os.close(writer)
        os.close(reader)


@contextlib.contextmanager
def at_sudden_end(act: Callable[[], None]) -> Iterator[None]:
    """Call ``act`` in a thread before a second Ctrl-C within this context ends the process."""
    _last_acts.append(act)
    try:
        yield
    finally:
        _last_acts.remove(act)


@contextlib.contextmanager
def failing_alone(*of_all_ranks: type[Exception]) -> Iterator[None]:
    """Print an exception that this rank may have alone, and end its process with status 1 at once, under torchrun.

    Whatever this process would still close, such as a process group or a save in the background, would wait for ranks
    that wait for this rank.  All ranks raise the exceptions ``of_all_ranks`` and `OF_ALL_RANKS`.
    """
    try:
        yield
    except OF_ALL_RANKS + of_all_ranks:
        raise
    except Exception as error:
        if not _under_torchrun() or world_size() == 1:
            raise
        sys.excepthook(type(error), error, error.__traceback__)
        for act in _last_acts:
            act()
        os._exit(1)


def _count_presses(reader: int) -> None:
    by_torchrun = "SIGTERM" in os.environ.get("TORCHELASTIC_SIGNALS_TO_HANDLE", "SIGTERM") and _under_torchrun()
    second_presses = {signal.SIGINT, signal.SIGTERM} if by_torchrun else {signal.SIGINT}
    first: float | None = None
    while (number := os.read(reader, 1)) != _THE_END:
        if first is None:
            if number[0] == signal.SIGINT:
                first = time.monotonic()
                patience = "; torchrun waits 30 s for that (--shutdown-timeout)" if _under_torchrun() else ""
                _say(f"Ctrl-C: the run saves and ends after its present step{patience}; Ctrl-C again ends it at once")
        elif number[0] in second_presses and time.monotonic() - first > _SAME_PRESS_S:
            _say("Ctrl-C again: the run has ended at once; its steps since the last checkpoint are lost")
            for act in _last_acts:
                act()
            os._exit(EXIT_INTERRUPTED)


def _under_torchrun() -> bool:
    return "TORCHELASTIC_RUN_ID" in os.environ


def _say(text: str) -> None:
    if os.environ.get("RANK", "0") == "0":
        with contextlib.suppress(OSError):  # nobody reads it
            os.write(2, f"{speaker()}{text}\n".encode())


def _leave_wakeups_to_the_parent() -> None:
    """Stop a forked process, which saves a checkpoint, from reporting a Ctrl-C that its parent reports already."""
    if _own_wakeups:
        with contextlib.suppress(ValueError):  # not the main thread
            signal.set_wakeup_fd(-1)


_last_acts: list[Callable[[], None]] = []
_own_wakeups: list[int] = []
os.register_at_fork(after_in_child=_leave_wakeups_to_the_parent)


class Stop:
    """The decision whether the run ends at a step boundary, the same on every rank.

    A run ends for lack of time if the time that is left is less than ``margin_minutes`` plus the longest step so far.
    A launch completes at least one step before it ends, so even a limit that is too short makes progress.
    """

    def __init__(
        self,
        run_dir: Path | None,
        grid: RankGrid,
        *,
        time_limit_minutes: float | None = None,
        margin_minutes: float = 3.0,
    ) -> None:
        """Find the end of this process's time, and remove the `MARKER` of an earlier launch.

        ``run_dir``: the run directory; None writes and removes no marker.  ``time_limit_minutes``: the time limit,
        counted from the start of this process; None takes the end of the Slurm job, if there is a job.  Not a
        collective.
        """
        self._grid, self._marker = grid, None if run_dir is None else Path(run_dir) / MARKER
        self._margin_s = margin_minutes * 60
        self._ends: float | None = None  # in seconds of time.monotonic(); only rank 0's value counts
        self._boundary: float | None = None
        self._longest_step_s = 0.0
        self.reason: str | None = None
        self.plan: str | None = None
        """Rank 0's message about the time of the run."""
        if grid.is_reporter:
            if self._marker is not None:
                self._marker.unlink(missing_ok=True)
            self._find_end(time_limit_minutes)

    def agreed(self) -> bool:
        """Return whether the run must end now; every rank calls this method once per step boundary.

        Collectives: one all-reduce of an integer over the world.
        """
        from megatron_selfdistill.distributed.integers import max_over_ranks

        (code,) = max_over_ranks([_TIME_IS_UP if self._is_late() else max(_received, default=0)])
        if code:
            self.reason = "its time is nearly over" if code == _TIME_IS_UP else signal.Signals(code).name
        return bool(code)

    def leave_marker(self, step: int) -> None:
        """Write on rank 0 that the run can be started again, after the checkpoint of ``step`` is complete."""
        if self._grid.is_reporter and self._marker is not None:
            self._marker.parent.mkdir(parents=True, exist_ok=True)
            self._marker.write_text(f"step {step}: {self.reason}\n")

    def _is_late(self) -> bool:
        now, before = time.monotonic(), self._boundary
        self._boundary = now
        if before is None:
            return False
        self._longest_step_s = max(self._longest_step_s, now - before)
        return self._ends is not None and self._ends - now < self._longest_step_s + self._margin_s

    def _find_end(self, time_limit_minutes: float | None) -> None:
        if time_limit_minutes is not None:
            self._ends = _began + time_limit_minutes * 60
            self.plan = f"ends by itself after {time_limit_minutes:g} minutes (stop.time_limit_minutes)"
        elif "SLURM_JOB_ID" in os.environ:
            try:
                left = seconds_left_in_slurm(os.environ)
            except (OSError, ValueError, subprocess.SubprocessError) as error:
                self.plan = f"does not know when its Slurm job ends ({error}): set stop.time_limit_minutes"
                return
            if left is not None:
                self._ends = time.monotonic() + left
                self.plan = f"ends by itself before its Slurm job does, in {left / 60:.1f} minutes"


def seconds_left_in_slurm(variables: Mapping[str, str]) -> float | None:
    """Return the seconds until the Slurm job of ``variables`` ends; None if the job has no limit.

    Raises: OSError or SubprocessError if squeue cannot be run; ValueError for an answer that is not a time.
    """
    end = variables.get("SLURM_JOB_END_TIME")  # newer than Slurm 22.05
    if end is not None:
        return float(end) - time.time()
    command = ["squeue", "--noheader", f"--jobs={variables['SLURM_JOB_ID']}", "--format=%L"]
    asked = subprocess.run(command, check=True, capture_output=True, text=True, timeout=_SQUEUE_SECONDS)
    return seconds_of(asked.stdout.strip())


def seconds_of(duration: str) -> float | None:
    """Return the seconds of ``[days-][hours:]minutes:seconds``, squeue's format; None for UNLIMITED.

    Raises: ValueError for any other text.
    """
    if duration == "UNLIMITED":
        return None
    match = re.fullmatch(r"(?:(\d+)-)?(?:(\d+):)?(\d+):(\d+)", duration)
    if match is None:
        raise ValueError(f"expected a duration such as 1-02:03:04 from squeue, got {duration!r}")
    days, hours, minutes, seconds = (int(part or 0) for part in match.groups())
    return float(((days * 24 + hours) * 60 + minutes) * 60 + seconds)
