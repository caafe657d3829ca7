# Copyright (c) 2026 the megatron_selfdistill authors. Apache-2.0.
"""Lock a run directory, so that one run at a time trains in it, also on a shared file system.

``run_dir/lock`` is a lease of the library filelock: a file that names the owner, who renews it every `BEAT_S` seconds.
Another run takes it over at once if the owner was a process on the same host that has ended, and otherwise after
`SILENCE_S` seconds without a renewal on its own clock.  So the clocks of hosts need not agree.

A lease does not stop a former owner that goes on, for instance after a suspension.  `RunLock.renew` therefore looks at
the file before every write.
"""

from __future__ import annotations

import contextlib
import os
import sys
import time
from pathlib import Path

from filelock import SoftFileLease, Timeout

from megatron_selfdistill.errors import CheckpointError, ConfigError

LOCK = "lock"
"""The lock's name in the run directory."""
BEAT_S = 5.0
"""Seconds between two renewals of an owner."""
SILENCE_S = 120.0
"""Seconds without a renewal after which an owner counts as dead."""


class RunLock:
    """The lock of one run directory, which rank 0 of a run holds; a thread renews it from `acquire` to `release`."""

    def __init__(self, run_dir: Path) -> None:
        self.run_dir, self._made_run_dir = Path(run_dir), False
        self._lease = SoftFileLease(
            self.run_dir / LOCK, lease_duration=SILENCE_S, heartbeat_interval=BEAT_S, thread_local=False
        )

    def acquire(self) -> None:
        """Take the lock, and renew it from now on.

        Where another run has it, the call waits until the owner renews it, or for `SILENCE_S` seconds, and says so on
        standard error.

        Raises: `ConfigError` where the owner is alive, or where the directory is not writable.
        """
        try:
            self._made_run_dir = not self.run_dir.exists()
            self.run_dir.mkdir(parents=True, exist_ok=True)
            self._wait_for_turn()
        except OSError as error:
            self._remove_empty_run_dir()
            raise ConfigError(
                f"run_dir={self.run_dir} cannot be written: {error.strerror or error}; choose another directory"
            ) from error

    def renew(self) -> None:
        """Prove that this process still owns the directory, so that it may write there.

        The lock is taken again if the complete run directory was removed, so that no other run has worked in it.  A
        file server that does not answer gets `SILENCE_S` seconds, as long as another run must wait.

        Raises: `CheckpointError` where this process has lost the lock; OSError where the file system cannot tell.
        """
        looks, end = 0, time.monotonic() + SILENCE_S
        while looks < 3 and time.monotonic() < end:  # a waiting run may move the file aside for a moment
            owner = self._lease.owner
            if owner is not None and owner.token == self._lease.token:
                return
            with contextlib.suppress(OSError):  # from a file server that does not answer
                looks += owner is not None or not (self.run_dir / LOCK).exists()
            time.sleep(0.05)
        if owner is not None:
            loss = f"another run has taken the directory over ({self._owner()})"
        elif self.run_dir.exists():
            os.listdir(self.run_dir)  # which raises where the file server is away
            loss = f"{self.run_dir / LOCK} has been removed, or a run that took the directory over has already ended"
        else:
            self._lease.release(force=True)
            self.acquire()
            _say(f"run_dir={self.run_dir} was removed while the run used it: the run holds its lock again")
            return
        raise CheckpointError(
            f"run_dir={self.run_dir} no longer belongs to this run: {loss}.  A run loses its directory when it gives "
            f"no sign of life for {SILENCE_S:g} s, such as a suspended one.  This run ends without writing anything"
        )

    def release(self) -> None:
        """Release the lock, and remove an empty run directory that `acquire` created.

        The call does nothing where this process does not hold the lock, or has lost it.
        """
        if self._lease.is_locked:
            self._lease.release(force=True)
            self._remove_empty_run_dir()

    def _wait_for_turn(self) -> None:
        seen: tuple[str | None, int] | None = None
        while True:
            try:
                self._lease.acquire(timeout=min(1.0, BEAT_S), poll_interval=min(0.1, BEAT_S / 4))
                return
            except Timeout:
                present = self._renewal()
            if present is None or seen is None or present[0] != seen[0]:
                seen = present
                if present is not None:
                    _say(
                        f"run_dir={self.run_dir} is locked by another run ({self._owner()}): waiting up to "
                        f"{SILENCE_S:g} s for a sign that it is alive"
                    )
            elif present != seen:
                raise ConfigError(
                    f"run_dir={self.run_dir} is in use by another run ({self._owner()}), which is alive: choose "
                    f"another run_dir, or end that run.  If you know that no run uses it, remove {self.run_dir / LOCK}"
                )

    def _renewal(self) -> tuple[str | None, int] | None:
        """Return the owner's token and the time of the last renewal, in the server's ns; None without an owner."""
        owner = self._lease.owner
        with contextlib.suppress(OSError):
            return None if owner is None else (owner.token, (self.run_dir / LOCK).stat().st_mtime_ns)
        return None

    def _owner(self) -> str:
        owner = self._lease.owner
        return "unknown" if owner is None else f"host {owner.hostname}, process {owner.pid}"

    def _remove_empty_run_dir(self) -> None:
        if self._made_run_dir:
            with contextlib.suppress(OSError):  # not empty
                self.run_dir.rmdir()


def _say(text: str) -> None:
    print(text, file=sys.stderr, flush=True)
