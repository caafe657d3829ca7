# Copyright (c) 2026 the megatron_selfdistill authors. Apache-2.0.
"""One run at a time owns a run directory; a dead or silent owner loses it, and notices before it writes again.

Time passes only where somebody sleeps (`Clock`), and no thread renews a lock unless a test starts whole runs.
"""

from __future__ import annotations

import errno
import os
import re
import shutil
import socket
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import forks
import pytest
import tiny_run
from filelock import _marker
from tiny_run import overrides, reproducible_metrics, saved_step, train

from megatron_selfdistill.checkpoint import run_lock
from megatron_selfdistill.checkpoint.run_lock import LOCK, SILENCE_S, RunLock
from megatron_selfdistill.errors import CheckpointError, ConfigError


class Clock:
    """The module ``time``, whose time is the sum of all sleeps; ``events`` happen in the sleep that reaches them."""

    def __init__(self) -> None:
        self.now, self.events = 0.0, dict[float, Callable[[], Any]]()
        self.time = time.time

    def monotonic(self) -> float:
        return self.now

    perf_counter = monotonic

    def sleep(self, seconds: float) -> None:
        self.now += seconds
        for moment in [moment for moment in self.events if moment <= self.now]:
            self.events.pop(moment)()


@pytest.fixture
def clock(monkeypatch) -> Clock:
    """Replace the clock of run locks and of the library filelock."""
    made = Clock()
    for name, module in list(sys.modules.items()):
        if (name.startswith("filelock") or module is run_lock) and getattr(module, "time", None) is time:
            monkeypatch.setattr(module, "time", made)
    return made


@pytest.fixture
def run_dir(tmp_path) -> Path:
    return tmp_path / "run"


def acquired(run_dir: Path, host: str | None = None) -> RunLock:
    """Return a lock that is held, and that nobody renews; ``host`` is the name of an owner's other host."""
    lock = RunLock(run_dir)
    with pytest.MonkeyPatch.context() as patch:
        if host is not None:
            patch.setattr(socket, "gethostname", lambda: host)
        lock.acquire()
    lock._lease._stop_heartbeat()
    return lock


def test_a_directory_that_cannot_be_made_is_refused(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(ConfigError, match="file/run cannot be written"):
        RunLock(tmp_path / "file" / "run").acquire()


def test_an_owner_that_renews_its_lock_keeps_it_whatever_the_clocks_say(run_dir, clock):
    owner = acquired(run_dir, "elsewhere")
    os.utime(run_dir / LOCK, (0, 0))
    before = list(run_dir.iterdir())
    clock.events[SILENCE_S / 2] = lambda: os.utime(run_dir / LOCK, (1, 1))
    with pytest.raises(ConfigError) as refused:
        RunLock(run_dir).acquire()
    assert SILENCE_S / 2 <= clock.now < SILENCE_S / 2 + 5, "refused as soon as the owner renews the lock"
    for named in (f"run_dir={run_dir}", "host elsewhere", f"process {os.getpid()}", str(run_dir / LOCK)):
        assert named in str(refused.value)
    assert list(run_dir.iterdir()) == before
    owner.renew()
    owner.release()


def test_a_silent_owner_is_replaced_after_its_silence_and_notices_without_touching_the_new_lock(run_dir, clock, capsys):
    silent = acquired(run_dir, "elsewhere")
    os.utime(run_dir / LOCK, (2**33, 2**33))
    new = acquired(run_dir)
    assert SILENCE_S <= clock.now < SILENCE_S + 5
    assert capsys.readouterr().err.count(f"waiting up to {SILENCE_S:g} s") == 1
    with pytest.raises(CheckpointError, match=f"no longer belongs to this run: .*process {os.getpid()}"):
        silent.renew()
    silent.release()
    new.renew()
    new.release()


def test_an_owner_that_has_ended_on_this_host_is_replaced_at_once(run_dir, clock):
    held: list[RunLock] = []  # else the end of the object releases the lock
    assert forks.in_a_fork(lambda: held.append(acquired(run_dir)))[0] == 0
    assert (run_dir / LOCK).exists()
    acquired(run_dir).release()
    assert clock.now < 5


def test_a_released_lock_leaves_nothing_and_can_be_taken_again(run_dir):
    acquired(run_dir).release()
    assert not run_dir.exists(), "the directory was made for the lock alone"
    run_dir.mkdir()
    again = acquired(run_dir)
    again.release()
    again.release()
    assert list(run_dir.iterdir()) == []


def test_a_run_directory_that_was_removed_is_locked_again_and_one_that_others_used_is_lost(run_dir, clock):
    lock = acquired(run_dir)
    shutil.rmtree(run_dir)
    lock.renew()
    lock._lease._stop_heartbeat()
    assert (run_dir / LOCK).exists()
    lock.renew()
    (run_dir / LOCK).unlink()
    with pytest.raises(CheckpointError, match="no longer belongs to this run"):
        lock.renew()
    lock.release()


def test_a_file_server_that_does_not_answer_for_a_while_takes_nothing_from_its_owner(run_dir, clock, monkeypatch):
    lock = acquired(run_dir)
    read, answers_at = _marker._read_lock_file, SILENCE_S - 1

    def read_later(path: str) -> Any:
        if clock.now < answers_at:
            raise OSError(errno.ESTALE, "Stale file handle", path)
        return read(path)

    monkeypatch.setattr(_marker, "_read_lock_file", read_later)
    lock.renew()
    assert clock.now >= answers_at
    lock.release()


# -- whole runs --------------------------------------------------------------------------------------------------------


def impatient(arguments: list[str]) -> int:
    """Start a run that looks at a lock in use every tenth of a second."""
    return tiny_run.start_with(arguments, run_lock, "BEAT_S", 0.1)


def test_a_run_in_a_directory_in_use_ends_with_status_2_and_changes_nothing(ranks, data, run_dir, monkeypatch):
    monkeypatch.setattr(run_lock, "BEAT_S", 0.05)
    lock = RunLock(run_dir)
    lock.acquire()
    before = sorted(run_dir.rglob("*"))
    train(ranks, overrides(data, run_dir), world_size=2, start=impatient, expected=2)
    assert sorted(run_dir.rglob("*")) == before
    lock.renew()
    lock.release()


def robbed(arguments: list[str], at: int) -> int:
    """Run until another run takes the directory over after ``at`` steps; return the exit status."""
    from megatron_selfdistill.trainer import Trainer

    batches = Trainer.batches

    def rob(self: Any) -> Any:
        if self.step == at:
            self.checkpointer.finish()  # on all ranks: the steps until now are saved, however slow the writers are
            if self.grid.rank == 0:
                lock = self.run_dir / LOCK
                other = lock.with_name("other")
                other.write_text(re.sub("token=.*", "token=somebody", lock.read_text()))
                other.replace(lock)
        return batches(self)

    return tiny_run.start_with(arguments, Trainer, "batches", rob)


@pytest.mark.parametrize("background", ["true", pytest.param("false", marks=pytest.mark.full)])
def test_a_run_that_has_lost_its_directory_ends_on_all_ranks_without_writing(ranks, data, run_dir, background):
    arguments = overrides(data, run_dir, "checkpoint.save_every=1", f"checkpoint.async_save={background}")
    train(ranks, arguments, world_size=2, start=robbed, expected=2, at=1)
    assert [line["step"] for line in reproducible_metrics(run_dir)] == [1]
    assert saved_step(run_dir) == 1
    assert "token=somebody" in (run_dir / LOCK).read_text()
