# Copyright (c) 2026 the megatron_selfdistill authors. Apache-2.0.
"""How a run is asked to end before its last step: SIGUSR1, SIGTERM, or the end of its time.

    with listening():                            # before torch is imported: a signal that comes earlier is lost
        stop = Stop(run_dir, grid, ...)
        while steps are left and not stop.agreed():
            ...
        save a checkpoint
        stop.leave_marker(step)

Signals only set a flag, however many there are: nothing in the middle of a step, and no save, is ever broken off by
one.  Ctrl-C and SIGKILL end a run at once.
"""

from __future__ import annotations

import contextlib
import os
import re
import signal
import subprocess
import time
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from megatron_selfdistill.parallel import Grid

MARKER = "stopped"
"""The file in the run folder that says: stopped when asked, checkpoint written, start me again."""

SIGNALS = (signal.SIGUSR1, signal.SIGTERM)
_TIME_IS_UP = 1000  # above all signals
_SQUEUE_SECONDS = 60.0

_began = time.monotonic()  # this module is among the first that a run imports
_received: set[int] = set()


@contextlib.contextmanager
def listening() -> Iterator[None]:
    """Take note of `SIGNALS` instead of dying of them.  For the main thread."""
    _received.clear()
    before = {number: signal.signal(number, _take_note) for number in SIGNALS}
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, signal.SIG_DFL if handler is None else handler)


def _take_note(number: int, frame: Any) -> None:
    _received.add(number)


class Stop:
    """Whether the run shall end at this step boundary, the same answer on every rank.

    A run ends in time where what is left of its time is less than ``margin_minutes`` and its longest step so far; a
    launch does at least one step before, so a limit that is too short for any still leads on.
    """

    def __init__(
        self, run_dir: Path, grid: Grid, *, time_limit_minutes: float | None = None, margin_minutes: float = 3.0
    ) -> None:
        """``time_limit_minutes``: after the start of this process; None: when the Slurm job ends, if this is one.
        A `MARKER` of an earlier launch is removed.  Not a collective."""
        self._grid, self._marker = grid, Path(run_dir) / MARKER
        self._margin_s = margin_minutes * 60
        self._ends: float | None = None  # in seconds of time.monotonic(); rank 0's counts
        self._boundary: float | None = None
        self._longest_step_s = 0.0
        self.reason: str | None = None
        self.plan: str | None = None
        """What rank 0 has to say of the run's time."""
        if grid.is_reporter:
            self._marker.unlink(missing_ok=True)
            self._find_end(time_limit_minutes)

    def agreed(self) -> bool:
        """Once per step boundary.  Collectives: one all-reduce of an integer over the world."""
        import torch
        import torch.distributed as dist

        own = max(_received, default=0)
        if self._is_late():
            own = _TIME_IS_UP
        asked = torch.tensor([own], dtype=torch.int32, device=self._grid.device)
        dist.all_reduce(asked, op=dist.ReduceOp.MAX)
        code = int(asked.item())
        if code:
            self.reason = "its time is nearly over" if code == _TIME_IS_UP else signal.Signals(code).name
        return bool(code)

    def leave_marker(self, step: int) -> None:
        """Say that the run can be started again, on rank 0; its checkpoint of ``step`` must lie there, whole."""
        if self._grid.is_reporter:
            self._marker.parent.mkdir(parents=True, exist_ok=True)
            self._marker.write_text(f"step {step}: {self.reason}\n")

    def _is_late(self) -> bool:
        now = time.monotonic()
        if self._boundary is None:
            self._boundary = now
            return False
        self._longest_step_s = max(self._longest_step_s, now - self._boundary)
        self._boundary = now
        return self._ends is not None and self._ends - now < self._longest_step_s + self._margin_s

    def _find_end(self, time_limit_minutes: float | None) -> None:
        if time_limit_minutes is not None:
            self._ends = _began + time_limit_minutes * 60
            self.plan = f"ends by itself after {time_limit_minutes:g} minutes (stop.time_limit_minutes)"
        elif "SLURM_JOB_ID" in os.environ:
            try:
                left = seconds_left_in_slurm(os.environ)
            except (OSError, ValueError, subprocess.SubprocessError) as error:
                self.plan = (
                    f"does not know when its Slurm job ends ({error}): signals alone end it in time, unless "
                    "stop.time_limit_minutes is set"
                )
                return
            if left is not None:
                self._ends = time.monotonic() + left
                self.plan = f"ends by itself before its Slurm job does, in {left / 60:.1f} minutes"


def seconds_left_in_slurm(environment: Mapping[str, str]) -> float | None:
    """Until the Slurm job of ``environment`` ends; None where it has no limit.

    Raises OSError or SubprocessError where squeue cannot be asked, ValueError for an answer that is no time.
    """
    end = environment.get("SLURM_JOB_END_TIME")  # newer than Slurm 22.05
    if end is not None:
        return float(end) - time.time()
    command = ["squeue", "--noheader", f"--jobs={environment['SLURM_JOB_ID']}", "--format=%L"]
    asked = subprocess.run(command, check=True, capture_output=True, text=True, timeout=_SQUEUE_SECONDS)
    return seconds_of(asked.stdout.strip())


def seconds_of(duration: str) -> float | None:
    """Of ``[days-][hours:]minutes:seconds``, as squeue writes it; None for UNLIMITED.  Raises ValueError otherwise."""
    if duration == "UNLIMITED":
        return None
    match = re.fullmatch(r"(?:(\d+)-)?(?:(\d+):)?(\d+):(\d+)", duration)
    if match is None:
        raise ValueError(f"expected a duration such as 1-02:03:04 from squeue, got {duration!r}")
    days, hours, minutes, seconds = (int(part or 0) for part in match.groups())
    return float(((days * 24 + hours) * 60 + minutes) * 60 + seconds)
