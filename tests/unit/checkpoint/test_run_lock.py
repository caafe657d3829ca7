# Copyright (c) 2026 the megatron_selfdistill authors. Apache-2.0.
"""One run at a time owns a run directory; a dead or silent owner loses it, and notices before it writes again."""

from __future__ import annotations

import errno
import os
import re
import shutil
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
import tiny_run
from filelock import _marker
from tiny_run import overrides, reproducible_metrics, saved_step, train

from megatron_selfdistill.checkpoint import run_lock
from megatron_selfdistill.checkpoint.run_lock import LOCK, RunLock
from megatron_selfdistill.checkpoint.run_lock import SILENCE_S as SILENCE_OF_RUNS_S
from megatron_selfdistill.errors import CheckpointError, ConfigError

pytestmark = pytest.mark.timing

REPOSITORY = Path(__file__).resolve().parents[3]
BEAT_S, SILENCE_S = 0.1, 3.0


@pytest.fixture(autouse=True)
def impatient(monkeypatch) -> None:
    monkeypatch.setattr(run_lock, "BEAT_S", BEAT_S)
    monkeypatch.setattr(run_lock, "SILENCE_S", SILENCE_S)


def acquired(run_dir: Path) -> RunLock:
    lock = RunLock(run_dir)
    lock.acquire()
    return lock


def elsewhere(run_dir: Path) -> RunLock:
    """Make an owner on another host."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(socket, "gethostname", lambda: "elsewhere")
        return acquired(run_dir)


@pytest.fixture
def run_dir(tmp_path) -> Path:
    return tmp_path / "run"


def test_a_directory_that_cannot_be_made_is_refused(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(ConfigError, match=r"file/run cannot be written: .*; choose another directory"):
        RunLock(tmp_path / "file" / "run").acquire()


def test_a_second_run_is_refused_with_the_first_ones_host_and_process(run_dir):
    first = acquired(run_dir)
    before = list(run_dir.iterdir())
    with pytest.raises(ConfigError) as refused:
        RunLock(run_dir).acquire()
    message = str(refused.value)
    assert f"run_dir={run_dir} is in use by another run" in message and "\n" not in message
    assert f"host {os.uname().nodename}" in message and f"process {os.getpid()}" in message
    assert "choose another run_dir" in message and f"remove {run_dir / LOCK}" in message
    assert list(run_dir.iterdir()) == before
    first.renew()
    first.release()


def test_a_released_lock_leaves_nothing_and_can_be_taken_again(run_dir):
    acquired(run_dir).release()
    assert not run_dir.exists(), "the directory was made for the lock alone"
    run_dir.mkdir()
    again = acquired(run_dir)
    again.release()
    again.release()
    assert list(run_dir.iterdir()) == []


def killed_owner(run_dir: Path, signal_number: int = signal.SIGKILL) -> subprocess.Popen[str]:
    """Return a process that holds the lock and has just received a signal; SIGCONT continues the process."""
    code = (
        "import sys, time; from pathlib import Path; from megatron_selfdistill.checkpoint import run_lock\n"
        f"run_lock.BEAT_S, run_lock.SILENCE_S = {BEAT_S}, {SILENCE_S}\n"
        "lock = run_lock.RunLock(Path(sys.argv[1])); lock.acquire()\n"
        "print('locked', flush=True)\n"
        "while lock._lease.compromise is None: time.sleep(0.01)\n"
        "try: lock.renew()\n"
        "except Exception as error: print(error, flush=True)\n"
        "lock.release()"
    )
    environment = os.environ | {"PYTHONPATH": str(REPOSITORY)}
    command = [sys.executable, "-c", code, str(run_dir)]
    process = subprocess.Popen(command, env=environment, stdout=subprocess.PIPE, text=True)
    assert process.stdout is not None and process.stdout.readline() == "locked\n"
    process.send_signal(signal_number)
    return process


def test_a_suspended_owner_is_replaced_after_its_silence_and_notices_without_touching_the_new_lock(run_dir, capsys):
    process = killed_owner(run_dir, signal.SIGSTOP)
    began = time.monotonic()
    new = acquired(run_dir)
    assert time.monotonic() - began >= SILENCE_S
    assert capsys.readouterr().err.count(f"waiting up to {SILENCE_S:g} s") == 1
    process.send_signal(signal.SIGCONT)
    output, _ = process.communicate(timeout=60)
    assert "no longer belongs to this run: another run has taken the directory over" in output
    assert f"{os.getpid()}" in output
    new.renew()
    new.release()


def test_an_owner_elsewhere_is_judged_by_its_renewals_alone_whatever_the_clocks_say(run_dir):
    alive = elsewhere(run_dir)
    os.utime(run_dir / LOCK, (0, 0))
    with pytest.raises(ConfigError, match="host elsewhere"):
        RunLock(run_dir).acquire()  # refused as soon as the owner renews the lock
    alive._lease._stop_heartbeat()
    os.utime(run_dir / LOCK, (2**33, 2**33))
    new = acquired(run_dir)
    with pytest.raises(CheckpointError, match="another run has taken the directory over"):
        alive.renew()
    alive.release()
    new.renew()
    new.release()


def test_a_run_directory_that_was_removed_is_locked_again_and_one_that_others_used_is_lost(run_dir):
    lock = acquired(run_dir)
    shutil.rmtree(run_dir)
    lock.renew()
    assert (run_dir / LOCK).exists()
    lock.renew()
    (run_dir / LOCK).unlink()
    with pytest.raises(CheckpointError, match="a run that took the directory over has already ended"):
        lock.renew()
    lock.release()


def test_a_file_server_that_does_not_answer_for_a_while_takes_nothing_from_its_owner(run_dir, monkeypatch):
    lock = acquired(run_dir)
    read, silent = _marker._read_lock_file, iter(range(9))

    def read_later(path: str) -> Any:
        if next(silent, None) is not None:
            raise OSError(errno.ESTALE, "Stale file handle", path)
        return read(path)

    monkeypatch.setattr(_marker, "_read_lock_file", read_later)
    lock.renew()
    assert next(silent, None) is None
    lock.release()


# -- whole runs --------------------------------------------------------------------------------------------------------


def test_a_run_in_a_directory_in_use_ends_with_status_2_and_changes_nothing(ranks, data, run_dir, monkeypatch):
    monkeypatch.setattr(run_lock, "SILENCE_S", SILENCE_OF_RUNS_S)
    lock = acquired(run_dir)
    before = sorted(run_dir.rglob("*"))
    train(ranks, overrides(data, run_dir), world_size=2, expected=2)
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
