# Copyright (c) 2026 the megatron_selfdistill authors. Apache-2.0.
"""The lock of a run directory: one run at a time trains into it, on any file system with atomic renames (NFS included).

    run_dir/lock/<id of the owner>.<heartbeats so far>       one file, which says who the owner is

Every change is one atomic operation on the file server that names what it expects to find:

    take       rename a prepared directory to ``lock``, which fails unless ``lock`` is missing or empty
    heartbeat  rename ``<id>.<n>`` to ``<id>.<n+1>``, which fails where somebody has broken the lock
    break      unlink ``<id>.<n>``, which fails where the owner has renewed it since the waiting process looked
    release    unlink the own file

So neither clocks that differ nor caches of the file system can give a directory to two runs: a waiting process compares
what it sees with what it saw, and the server decides.
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
_START_TOLERANCE_S = 5.0  # by which a process's start may seem to move when the clock is set
_LOST = (errno.ENOENT, errno.ENOTDIR, errno.ESTALE)


@dataclass(frozen=True)
class Owner:
    """Who holds a lock, as its file says."""

    id: str
    host: str
    machine: str
    """One boot of one machine, and the process namespace there: only within it does ``pid`` name a process."""
    pid: int
    started: float
    """When the process started, in seconds of the machine's clock."""
    since: str
    """When it took the lock, for people."""
    job: str | None = None
    """Its Slurm job."""
    restart: int = 0
    """How often Slurm had requeued the job."""
    cluster: str | None = None

    @classmethod
    def this_process(cls, id: str) -> Owner:
        """Describe the calling process, and its Slurm job where it has one."""
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
    """The lock of one run directory, held by one process of a run: rank 0.

    A thread renews it every ``beat_s`` seconds from `acquire` to `release`.
    """

    def __init__(
        self,
        run_dir: Path,
        *,
        beat_s: float = BEAT_S,
        silence_s: float = SILENCE_S,
        report: Callable[[str], None] = lambda text: print(text, file=sys.stderr, flush=True),
    ) -> None:
        """``report``: receives a line when `acquire` waits for an owner, and when it breaks the lock of one."""
        self.run_dir, self._directory = Path(run_dir), Path(run_dir) / LOCK
        self._beat_s, self._silence_s, self._report = beat_s, silence_s, report
        self._id, self._beats = uuid.uuid4().hex[:12], 0
        self._held = self._made_run_dir = False
        self._place: tuple[int, int] | None = None  # tells the run directory from one that was made again
        self._lost: str | None = None
        self._mutex, self._closing = threading.Lock(), threading.Event()
        self._thread = threading.Thread(target=self._beat_until_closed, name="run lock", daemon=True)

    def acquire(self) -> None:
        """Take the lock, and renew it from now on.

        An owner whose process or Slurm job is over loses the lock at once, one that gives no sign of life for
        ``silence_s`` seconds after that time, which this call waits for.
        Raises: `ConfigError` in one sentence where the owner is alive, or the directory cannot be written.
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
        """Prove that this process still owns the directory: after this call returns, what it writes is safe.

        Raises: `CheckpointError` where the lock is no longer this process's; OSError where that cannot be found out.
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
            self._thread.join(timeout=2 * self._beat_s)  # it may be waiting for a file server
        with contextlib.suppress(OSError):
            (self._directory / self._name(self._beats)).unlink()
            self._directory.rmdir()
        self._remove_empty_run_dir()

    # -- taking ---------------------------------------------------------------------------------------------------

    @contextlib.contextmanager
    def _prepared(self) -> Iterator[Path]:
        """A directory that becomes the lock when it is renamed."""
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
            # Time in which this process could run: an owner that was suspended along with it is not silent.
            waited, before = waited + min(now - before, 2 * poll_s), now
            name = self._present()
            if name is None:
                continue  # it has just been released
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
                over = f"it has given no sign of life for {self._silence_s:g} s"
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
                return True  # done, but the answer was lost and the request repeated (NFS)
            if error.errno not in (errno.ENOTEMPTY, errno.EEXIST):
                raise
            with contextlib.suppress(OSError):
                self._directory.rmdir()  # empty: for file systems that do not replace even that
            return False
        return True

    def _break(self, name: str) -> bool:
        """Remove the file ``name`` of an owner, unless the owner has renewed it since."""
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
        """Read who owns the lock; None where its file cannot be read, or is renamed in between."""
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
            if not new.exists():  # else done, but the answer was lost and the request repeated (NFS)
                if not self._take_again():
                    self._lost = self._loss()
                return
        self._beats += 1

    def _take_again(self) -> bool:
        """Take the lock again where somebody has removed the whole run directory, so that nobody's work is in it."""
        place = _place(self.run_dir)
        if place == self._place or (self.run_dir / "checkpoints").exists():
            return False  # another run may have taken the lock, trained, and released it
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
    """Return what tells a directory from another one of the same name; None where there is none."""
    try:
        status = directory.stat()
    except FileNotFoundError:
        return None
    return status.st_dev, status.st_ino


def _process_is_over(owner: Owner | None) -> str | None:
    """Return why the owner's process cannot be alive; None where it may be."""
    if owner is None or owner.machine != _machine() or _is_alive(owner.pid, owner.started):
        return None
    return f"its process {owner.pid} on this host has ended"


def _job_is_over(owner: Owner | None) -> str | None:
    """Return why the owner's Slurm job cannot be running; None where it may be, or where that cannot be told."""
    if owner is None or owner.job is None or owner.cluster != os.environ.get("SLURM_CLUSTER_NAME"):
        return None
    if owner.job == os.environ.get("SLURM_JOB_ID"):
        requeued = int(os.environ.get("SLURM_RESTART_COUNT", "0")) > owner.restart
        return f"Slurm has requeued its job {owner.job}, which is this job" if requeued else None
    return f"its Slurm job {owner.job} has ended" if _job_has_ended(owner.job) else None


def _machine() -> str:
    """Name one boot of this machine and this process namespace; where the system has neither, the host."""
    try:
        boot = Path("/proc/sys/kernel/random/boot_id").read_text().strip()
        return f"{boot} {os.readlink('/proc/self/ns/pid')}"
    except OSError:
        return f"{socket.gethostname()} {psutil.boot_time():.0f}"


def _is_alive(pid: int, started: float) -> bool:
    try:
        process = psutil.Process(pid)
        same = abs(process.create_time() - started) <= _START_TOLERANCE_S
        return same and process.status() != psutil.STATUS_ZOMBIE
    except psutil.NoSuchProcess:
        return False
    except psutil.AccessDenied:
        return True


def _job_has_ended(job: str) -> bool:
    """Ask Slurm; False where it cannot tell."""
    command = ["squeue", "--noheader", f"--jobs={job}", "--format=%T"]
    try:
        asked = subprocess.run(command, capture_output=True, text=True, timeout=_SQUEUE_SECONDS)
    except (OSError, subprocess.SubprocessError):
        return False
    if asked.returncode != 0:
        return "invalid job id" in asked.stderr.lower()  # so old that Slurm has forgotten it
    return not asked.stdout.strip()
