# Copyright (c) 2026 the megatron_selfdistill authors. Apache-2.0.
"""One run at a time owns a run directory; a dead or silent owner loses it, and notices before it writes again."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path
from typing import Any

import pytest
import tiny_run
from tiny_run import overrides, reproducible_metrics, saved_step, train

from megatron_selfdistill.checkpoint import run_lock
from megatron_selfdistill.checkpoint.run_lock import LOCK, RunLock
from megatron_selfdistill.errors import CheckpointError, ConfigError

pytestmark = pytest.mark.timing

REPOSITORY = Path(__file__).resolve().parents[3]
BEAT_S, SILENCE_S = 0.05, 0.6


def lock_of(run_dir: Path, reports: list[str] | None = None, **options: float) -> RunLock:
    reports = [] if reports is None else reports
    return RunLock(run_dir, report=reports.append, **{"beat_s": BEAT_S, "silence_s": SILENCE_S, **options})


def acquired(run_dir: Path, **options: float) -> RunLock:
    lock = lock_of(run_dir, **options)
    lock.acquire()
    return lock


def silenced(run_dir: Path, **changes: Any) -> RunLock:
    """Make an owner without heartbeats, whose file has ``changes``; by default the owner is on another host."""
    lock = acquired(run_dir, beat_s=3600.0)
    file = next((run_dir / LOCK).iterdir())
    owner = json.loads(file.read_text()) | {"machine": "another one", "host": "elsewhere"} | changes
    file.write_text(json.dumps(owner))
    return lock


@pytest.fixture
def run_dir(tmp_path) -> Path:
    return tmp_path / "run"


def test_a_second_run_is_refused_with_the_first_ones_host_process_job_and_start(run_dir, monkeypatch):
    monkeypatch.setenv("SLURM_JOB_ID", "4711")
    first = acquired(run_dir)
    before = list(run_dir.iterdir())
    with pytest.raises(ConfigError) as refused:
        lock_of(run_dir, silence_s=60.0).acquire()
    message = str(refused.value)
    assert f"run_dir={run_dir} is in use by another run" in message and "\n" not in message
    for part in (
        f"host {os.uname().nodename}",
        f"process {os.getpid()}",
        "Slurm job 4711",
        f"since {time.strftime('%F')}",
    ):
        assert part in message
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
    """Yield a process that holds the lock and has just received a signal; SIGCONT continues the process."""
    code = (
        "import sys, time; from pathlib import Path; from megatron_selfdistill.checkpoint.run_lock import RunLock\n"
        f"lock = RunLock(Path(sys.argv[1]), beat_s={BEAT_S}, silence_s={SILENCE_S}); lock.acquire()\n"
        "print('locked', flush=True)\n"
        "while lock._thread.is_alive(): time.sleep(0.01)\n"
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


@pytest.mark.parametrize("reaped", [True, False], ids=["gone", "a zombie"])
def test_a_killed_owner_on_this_host_is_replaced_at_once(run_dir, reaped):
    process = killed_owner(run_dir)
    if reaped:
        process.wait()
    reports: list[str] = []
    began = time.monotonic()
    lock = lock_of(run_dir, reports, silence_s=600.0)
    lock.acquire()
    assert time.monotonic() - began < 10
    assert f"its process {process.pid} on this host has ended" in reports[-1]
    lock.release()
    process.wait()


def test_an_owner_that_dies_while_one_waits_for_it_is_replaced_at_once(run_dir):
    process = killed_owner(run_dir, signal.SIGSTOP)
    threading.Timer(0.3, process.kill).start()
    began = time.monotonic()
    acquired(run_dir, silence_s=600.0).release()
    assert time.monotonic() - began < 60
    process.wait()


def test_a_process_that_has_got_a_dead_owners_number_is_not_the_owner(run_dir):
    machine = run_lock._machine()
    silenced(run_dir, machine=machine, pid=os.getpid(), started=12345.0)
    acquired(run_dir, silence_s=600.0).release()


def test_a_suspended_owner_is_replaced_after_its_silence_and_notices_without_touching_the_new_lock(run_dir):
    process = killed_owner(run_dir, signal.SIGSTOP)
    reports: list[str] = []
    began = time.monotonic()
    new = lock_of(run_dir, reports)
    new.acquire()
    assert time.monotonic() - began >= SILENCE_S
    assert "waiting up to 0.6 s" in reports[0] and "has given no sign of life for 0.6 s" in reports[1]
    process.send_signal(signal.SIGCONT)
    output, _ = process.communicate(timeout=60)
    assert "no longer belongs to this run: another run has taken the directory over" in output
    assert f"{os.getpid()}" in output
    new.renew()
    new.release()


def test_an_owner_elsewhere_is_judged_by_its_heartbeats_alone_whatever_the_clocks_say(run_dir):
    alive = silenced(run_dir)
    os.utime(next((run_dir / LOCK).iterdir()), (0, 0))
    stopped = threading.Event()

    def beats() -> None:
        while not stopped.wait(0.05):
            alive.renew()

    thread = threading.Thread(target=beats)
    thread.start()
    with pytest.raises(ConfigError, match="host elsewhere"):
        lock_of(run_dir, silence_s=60.0).acquire()  # refused as soon as a heartbeat comes
    stopped.set()
    thread.join()
    os.utime(next((run_dir / LOCK).iterdir()), (2**33, 2**33))
    new = acquired(run_dir)
    with pytest.raises(CheckpointError, match="another run has taken the directory over"):
        alive.renew()
    alive.release()
    assert [file.name.partition(".")[0] for file in (run_dir / LOCK).iterdir()] == [new._id]
    new.renew()
    new.release()


def test_a_lock_that_its_owner_has_renewed_since_one_looked_cannot_be_broken(run_dir):
    owner = silenced(run_dir)
    seen = next((run_dir / LOCK).iterdir()).name
    owner.renew()
    assert not lock_of(run_dir)._break(seen)
    owner.renew()
    owner.release()


def test_of_many_that_find_a_dead_owner_one_gets_the_lock(run_dir):
    killed_owner(run_dir).wait()
    outcomes: list[Any] = []

    def attempt() -> None:
        lock = lock_of(run_dir, silence_s=60.0)
        try:
            lock.acquire()
            outcomes.append(lock)
        except ConfigError as refused:
            outcomes.append(str(refused))

    threads = [threading.Thread(target=attempt) for _ in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    (winner,) = (outcome for outcome in outcomes if isinstance(outcome, RunLock))
    assert sum("is in use by another run" in str(outcome) for outcome in outcomes) == 7
    winner.renew()
    winner.release()
    assert not (run_dir / LOCK).exists()


def test_a_job_that_slurm_has_requeued_replaces_its_former_self_at_once(run_dir, monkeypatch):
    silenced(run_dir, job="7", restart=0)
    monkeypatch.setenv("SLURM_JOB_ID", "7")
    monkeypatch.setenv("SLURM_RESTART_COUNT", "1")
    acquired(run_dir, silence_s=600.0).release()


@pytest.mark.parametrize(
    ("script", "over"),
    [
        ("exit 0", True),
        ("echo slurm_load_jobs error: Invalid job id specified >&2; exit 1", True),
        ("echo RUNNING", False),
    ],
)
def test_a_slurm_job_that_is_over_loses_the_lock_at_once_and_no_other(run_dir, tmp_path, monkeypatch, script, over):
    squeue = tmp_path / "squeue"
    squeue.write_text(f"#!/bin/sh\n{script}\n")
    squeue.chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path}:{os.environ['PATH']}")
    silenced(run_dir, job="7")
    reports: list[str] = []
    lock = lock_of(run_dir, reports)
    lock.acquire()
    assert ("its Slurm job 7 has ended" in reports[0]) == over, reports
    lock.release()


def test_a_run_directory_that_was_removed_is_locked_again_and_one_that_others_used_is_lost(run_dir):
    lock = acquired(run_dir, beat_s=3600.0)
    shutil.rmtree(run_dir)
    lock.renew()
    assert [file.name for file in (run_dir / LOCK).iterdir()] == [f"{lock._id}.0"]
    lock.renew()
    shutil.rmtree(run_dir / LOCK)
    with pytest.raises(CheckpointError, match="a run that took the directory over has already ended"):
        lock.renew()
    lock.release()


def test_a_directory_that_cannot_be_written_gives_a_message(run_dir, monkeypatch):
    def refuse(*args: Any, **kwargs: Any) -> None:
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr(Path, "mkdir", refuse)
    with pytest.raises(ConfigError, match="cannot be written: Permission denied; choose another directory"):
        lock_of(run_dir).acquire()


# -- whole runs --------------------------------------------------------------------------------------------------------


def test_a_run_in_a_directory_in_use_ends_on_all_ranks_with_status_2_and_changes_nothing(ranks, data, run_dir):
    lock = acquired(run_dir)
    before = sorted(path for path in run_dir.rglob("*") if path.parent.name != LOCK)
    train(ranks, overrides(data, run_dir), world_size=2, expected=2)
    assert sorted(path for path in run_dir.rglob("*") if path.parent.name != LOCK) == before
    lock.renew()
    lock.release()


def test_a_dry_run_needs_no_lock_and_writes_nothing(ranks, data, run_dir):
    lock = acquired(run_dir)
    (run_dir / "stopped").write_text("by the other run")
    before = sorted(path for path in run_dir.rglob("*") if path.parent.name != LOCK)
    train(ranks, overrides(data, run_dir, "dry_run=true"))
    assert sorted(path for path in run_dir.rglob("*") if path.parent.name != LOCK) == before
    lock.release()


def robbed(arguments: list[str], at: int) -> int:
    """Run until another run takes the directory over after ``at`` steps; return the exit status."""
    from megatron_selfdistill.trainer import Trainer

    batches = Trainer.batches

    def rob(self: Any) -> Any:
        if self.step == at:
            self.checkpointer.finish()  # on all ranks: the steps until now are saved, however slow the writers are
            if self.grid.rank == 0:
                (file,) = (self.run_dir / LOCK).iterdir()
                file.rename(file.with_name("somebody.0"))
        return batches(self)

    return tiny_run.start_with(arguments, Trainer, "batches", rob)


@pytest.mark.parametrize("background", ["true", pytest.param("false", marks=pytest.mark.full)])
def test_a_run_that_has_lost_its_directory_ends_on_all_ranks_without_writing(ranks, data, run_dir, background):
    arguments = overrides(data, run_dir, "checkpoint.save_every=1", f"checkpoint.async_save={background}")
    train(ranks, arguments, world_size=2, start=robbed, expected=2, at=1)
    assert [line["step"] for line in reproducible_metrics(run_dir)] == [1]
    assert saved_step(run_dir) == 1
    assert [file.name for file in (run_dir / LOCK).iterdir()] == ["somebody.0"]


def test_a_run_that_ends_in_any_way_gives_its_lock_back(ranks, data, run_dir):
    train(ranks, overrides(data, run_dir, "num_steps=1", "guards.start.max_teacher_cross_entropy=1e-6"), expected=3)
    assert not (run_dir / LOCK).exists()
    train(ranks, overrides(data, run_dir, "data.path=nowhere.jsonl"), expected=2)
    assert run_dir.exists() and not (run_dir / LOCK).exists()
