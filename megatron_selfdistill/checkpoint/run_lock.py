# Copyright (c) 2026 the megatron_selfdistill authors. Apache-2.0.
"""Lock a run directory, so that one run at a time trains in it, on any file system with atomic renames (also NFS).

    run_dir/lock/<id of the owner>.<heartbeats so far>       one file, which describes the owner

Every change is one atomic operation on the file server, which names the state that it expects:

    take       rename a prepared directory to ``lock``; fails unless ``lock`` is missing or empty
    heartbeat  rename ``<id>.<n>`` to ``<id>.<n+1>``; fails after another process has broken the lock
    break      unlink ``<id>.<n>``; fails if the owner has renewed the lock since the waiting process looked
    release    unlink the file of this process

Neither different clocks nor caches of the file system can give a directory to two runs: a waiting process compares two
of its own observations, and the server decides.
"""

from __future__ import annotations

import contextlib
import errno
import json
import os
import shutil
import socket
import subprocess
import sys
import threading
import time
import uuid
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from pathlib import Path

import psutil

from megatron_selfdistill.errors import CheckpointError, ConfigError

LOCK = "lock"
"""The lock's name in the run directory."""
BEAT_S = 5.0
"""Seconds between two heartbeats of an owner."""
SILENCE_S = 120.0
"""Seconds without a heartbeat after which an owner counts as dead."""

_SQUEUE_SECONDS = 30.0
_START_TOLERANCE_S = 5.0  # a change of the clock may move the start of a process by so much
_LOST = (errno.ENOENT, errno.ENOTDIR, errno.ESTALE)


@dataclass(frozen=True)
class Owner:
    """The owner of a lock, as described in the file of the lock."""

    id: str
    """A random id, unique to one `RunLock`."""
    host: str
    machine: str
    """The boot and the process namespace of the machine, within which ``pid`` identifies a process."""
    pid: int
    started: float
    """The start of the process, in seconds of the machine's clock."""
    since: str
    """The local time at which the owner took the lock, for messages."""
    job: str | None = None
    """The id of the owner's Slurm job; None outside of Slurm."""
    restart: int = 0
    """The number of times that Slurm had requeued the job."""
    cluster: str | None = None
    """The name of the Slurm cluster."""

    @classmethod
    def this_process(cls, id: str) -> Owner:
        """Return the description of the calling process and of its Slurm job."""
        return cls(
            id=id,
            host=socket.gethostname(),
            machine=_machine(),
            pid=os.getpid(),
            started=psutil.Process().create_time(),
            since=time.strftime("%F %T %z"),
            job=os.environ.get("SLURM_JOB_ID"),
            restart=int(os.environ.get("SLURM_RESTART_COUNT", "0")),
            cluster=os.environ.get("SLURM_CLUSTER_NAME"),
        )

    def __str__(self) -> str:
        job = f", Slurm job {self.job}" if self.job else ""
        return f"host {self.host}, process {self.pid}{job}, since {self.since}"


class RunLock:
    """The lock of one run directory, which rank 0 of a run holds.

    A thread renews the lock every ``beat_s`` seconds from `acquire` to `release`.
    """

    def __init__(
        self,
        run_dir: Path,
        *,
        beat_s: float = BEAT_S,
        silence_s: float = SILENCE_S,
        report: Callable[[str], None] = lambda text: print(text, file=sys.stderr, flush=True),
    ) -> None:
        """Prepare the lock; ``report`` receives a line when `acquire` waits for an owner or breaks a lock."""
        self.run_dir, self._directory = Path(run_dir), Path(run_dir) / LOCK
        self._beat_s, self._silence_s, self._report = beat_s, silence_s, report
        self._id, self._beats = uuid.uuid4().hex[:12], 0
        self._held = self._made_run_dir = False
        self._place: tuple[int, int] | None = None  # identifies the run directory, to notice that it was created again
        self._lost: str | None = None
        self._mutex, self._closing = threading.Lock(), threading.Event()
        self._thread = threading.Thread(target=self._beat_until_closed, name="run lock", daemon=True)

    def acquire(self) -> None:
        """Take the lock, and renew it from now on.

        An owner whose process or Slurm job has ended loses the lock at once.  Another owner loses the lock after
        ``silence_s`` seconds without a heartbeat, for which this call waits.

        Raises: `ConfigError` where the owner is alive, or where the directory is not writable.
        """
        try:
            self._made_run_dir = not self.run_dir.exists()
            with self._prepared() as prepared:
                self._wait_for_turn(prepared)
            self._place = _place(self.run_dir)
        except OSError as error:
            self._remove_empty_run_dir()
            raise ConfigError(
                f"run_dir={self.run_dir} cannot be written: {error.strerror or error}; choose another directory"
            ) from error
        self._held = True
        self._thread.start()

    def renew(self) -> None:
        """Prove that this process still owns the directory, so that it may write there.

        Raises: `CheckpointError` where this process has lost the lock; OSError where the file system cannot tell.
        """
        with self._mutex:
            if self._lost is None:
                self._beat()
            if self._lost is not None:
                raise CheckpointError(self._lost)

    def release(self) -> None:
        """Release the lock, and remove an empty run directory that `acquire` created.

        The call does nothing where this process does not hold the lock, or has lost it.
        """
        if not self._held:
            return
        self._held = False
        self._closing.set()
        if threading.current_thread() is not self._thread:
            self._thread.join(timeout=2 * self._beat_s)  # the thread may be waiting for a file server
        with contextlib.suppress(OSError):
            (self._directory / self._name(self._beats)).unlink()
            self._directory.rmdir()
        self._remove_empty_run_dir()

    # -- taking ---------------------------------------------------------------------------------------------------

    @contextlib.contextmanager
    def _prepared(self) -> Iterator[Path]:
        """Yield a prepared directory, which becomes the lock when it is renamed."""
        prepared = self.run_dir / f".{LOCK}_{self._id}"
        prepared.mkdir(parents=True)
        try:
            owner = json.dumps(asdict(Owner.this_process(self._id)))
            (prepared / self._name(0)).write_text(owner, encoding="utf-8")
            yield prepared
        finally:
            shutil.rmtree(prepared, ignore_errors=True)

    def _wait_for_turn(self, prepared: Path) -> None:
        poll_s = min(1.0, self._beat_s / 2)
        watched, waited, before = None, 0.0, time.monotonic()
        while not self._take(prepared):
            now = time.monotonic()
            # Count only the time in which this process ran: the owner may have been suspended together with it.
            waited, before = waited + min(now - before, 2 * poll_s), now
            name = self._present()
            if name is None:
                continue  # the owner has just released the lock
            if watched is None or watched.partition(".")[0] != name.partition(".")[0]:
                watched, waited, owner = name, 0.0, self._owner(name)
                over = _job_is_over(owner)
                if over is None and _process_is_over(owner) is None:
                    self._report(
                        f"run_dir={self.run_dir} is locked by another run ({owner or 'unknown'}): waiting up to "
                        f"{self._silence_s:g} s for a sign that it is alive"
                    )
            elif name != watched:
                raise ConfigError(self._refusal(owner))
            over = over or _process_is_over(owner)
            if over is None and waited >= self._silence_s:
                over = f"its owner has given no sign of life for {self._silence_s:g} s"
            if over is None:
                time.sleep(poll_s)
            elif self._break(name):
                self._report(
                    f"run_dir={self.run_dir}: the lock of an earlier run ({owner or 'unknown'}) is void: {over}"
                )

    def _take(self, prepared: Path) -> bool:
        try:
            prepared.rename(self._directory)
        except OSError as error:
            if (self._directory / self._name(0)).exists():
                return True  # the rename was done, but NFS lost the answer and repeated the request
            if error.errno not in (errno.ENOTEMPTY, errno.EEXIST):
                raise
            with contextlib.suppress(OSError):
                self._directory.rmdir()  # the empty directory, which some file systems do not replace
            return False
        return True

    def _break(self, name: str) -> bool:
        """Remove the file ``name`` of an owner; return False if the owner has renewed the lock since."""
        try:
            (self._directory / name).unlink()
        except OSError:
            return False
        return True

    def _present(self) -> str | None:
        try:
            return min(os.listdir(self._directory), default=None)
        except FileNotFoundError:
            return None

    def _owner(self, name: str) -> Owner | None:
        """Return the owner of the lock; None if its file cannot be read, or is renamed at the same time."""
        for _ in range(3):
            try:
                return Owner(**json.loads((self._directory / name).read_text(encoding="utf-8")))
            except FileNotFoundError:
                name = self._present() or name
            except (OSError, ValueError, TypeError):
                break
        return None

    def _refusal(self, owner: Owner | None) -> str:
        return (
            f"run_dir={self.run_dir} is in use by another run ({owner or 'unknown'}), which is alive: choose another "
            f"run_dir, or end that run first; nothing has been changed.  If you are certain that no run uses this "
            f"directory, remove {self._directory}"
        )

    # -- holding --------------------------------------------------------------------------------------------------

    def _name(self, beat: int) -> str:
        return f"{self._id}.{beat}"

    def _beat_until_closed(self) -> None:
        while self._lost is None and not self._closing.wait(self._beat_s):
            with contextlib.suppress(OSError, CheckpointError):  # a file server may be away for a while
                self.renew()

    def _beat(self) -> None:
        old, new = (self._directory / self._name(beat) for beat in (self._beats, self._beats + 1))
        try:
            old.rename(new)
        except OSError as error:
            if error.errno not in _LOST:
                raise
            if not new.exists():  # else the rename was done, but NFS lost the answer and repeated the request
                if not self._take_again():
                    self._lost = self._loss()
                return
        self._beats += 1

    def _take_again(self) -> bool:
        """Take the lock again if the complete run directory was removed, so that no other run has worked in it."""
        place = _place(self.run_dir)
        if place == self._place or (self.run_dir / "checkpoints").exists():
            return False  # another run may have taken the lock, trained and released the lock
        with self._prepared() as prepared:
            if not self._take(prepared):
                return False
        self._beats, self._place = 0, _place(self.run_dir)
        self._report(f"run_dir={self.run_dir} was removed while the run used it: the run holds its lock again")
        return True

    def _loss(self) -> str:
        name = self._present()
        if name is None:
            what = f"{self._directory} has been removed, or a run that took the directory over has already ended"
        else:
            what = f"another run has taken the directory over ({self._owner(name) or 'unknown'})"
        return (
            f"run_dir={self.run_dir} no longer belongs to this run: {what}.  A run loses its directory when it gives "
            f"no sign of life for {self._silence_s:g} s, for instance while it is suspended.  This run ends without "
            "writing anything"
        )

    def _remove_empty_run_dir(self) -> None:
        if self._made_run_dir:
            with contextlib.suppress(OSError):  # not empty
                self.run_dir.rmdir()


def _place(directory: Path) -> tuple[int, int] | None:
    """Return an identification of a directory, independent of its name; None if the directory is missing."""
    try:
        status = directory.stat()
    except FileNotFoundError:
        return None
    return status.st_dev, status.st_ino


def _process_is_over(owner: Owner | None) -> str | None:
    """Return why the owner's process cannot be alive; None if the process may be alive."""
    if owner is None or owner.machine != _machine() or _is_alive(owner.pid, owner.started):
        return None
    return f"its process {owner.pid} on this host has ended"


def _job_is_over(owner: Owner | None) -> str | None:
    """Return why the owner's Slurm job cannot be running; None if the job may be running."""
    if owner is None or owner.job is None or owner.cluster != os.environ.get("SLURM_CLUSTER_NAME"):
        return None
    if owner.job == os.environ.get("SLURM_JOB_ID"):
        requeued = int(os.environ.get("SLURM_RESTART_COUNT", "0")) > owner.restart
        return f"Slurm has requeued its job {owner.job}, which is this job" if requeued else None
    return f"its Slurm job {owner.job} has ended" if _job_has_ended(owner.job) else None


def _machine() -> str:
    """Return the boot id and process namespace of this machine; else its host name and the time of its boot."""
    try:
        boot = Path("/proc/sys/kernel/random/boot_id").read_text().strip()
        return f"{boot} {os.readlink('/proc/self/ns/pid')}"
    except OSError:
        return f"{socket.gethostname()} {psutil.boot_time():.0f}"


def _is_alive(pid: int, started: float) -> bool:
    try:
        process = psutil.Process(pid)
        same = abs(process.create_time() - started) <= _START_TOLERANCE_S
        return bool(same and process.status() != psutil.STATUS_ZOMBIE)
    except psutil.NoSuchProcess:
        return False
    except psutil.AccessDenied:
        return True


def _job_has_ended(job: str) -> bool:
    """Return whether Slurm reports that the job has ended; False where Slurm gives no answer."""
    command = ["squeue", "--noheader", f"--jobs={job}", "--format=%T"]
    try:
        asked = subprocess.run(command, capture_output=True, text=True, timeout=_SQUEUE_SECONDS)
    except (OSError, subprocess.SubprocessError):
        return False
    if asked.returncode != 0:
        return "invalid job id" in asked.stderr.lower()  # Slurm forgets old jobs
    return not asked.stdout.strip()
