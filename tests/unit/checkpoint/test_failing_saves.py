# Copyright (c) 2026 the megatron_selfdistill authors. Apache-2.0.
"""What a failing or killed save leaves behind: the checkpoint before it, from which the next run goes on."""

from __future__ import annotations

import contextlib
import dataclasses
import os
import signal
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any
from unittest import mock

import checkpointed_run
import pytest
import tiny_run
import torch
from checkpointed_run import Setup
from megatron.core.dist_checkpointing.strategies.filesystem_async import FileSystemWriterAsync
from ranks import RankError
from saved_checkpoints import checkpoint_names, raises

from megatron_selfdistill.checkpoint import sharded_io
from megatron_selfdistill.errors import CheckpointError

PLAIN = Setup(teacher="current", model_changes={"num_layers": 2})


def fail_on_rank_1(run_dir: Path) -> None:
    run = checkpointed_run.start(PLAIN.cut(tp=2), run_dir, steps=1)
    run.save(1)
    with pytest.MonkeyPatch.context() as patch:
        if run.grid.rank == 1:
            patch.setattr(FileSystemWriterAsync, "write_preloaded_data", staticmethod(failing_writer))
        with raises("could not write .*iter_0000002"):
            run.save(2)
    assert run.checkpointer.latest() == run_dir / "checkpoints" / "iter_0000001"
    with pytest.MonkeyPatch.context() as patch:
        if run.grid.rank == 0:
            patch.setattr("shutil.disk_usage", lambda path: type("Usage", (), {"free": 17}))
        with raises(r"needs [\d,]+ bytes but .* has 17 free"):
            run.save(2)
    run.save(2)
    names = ["iter_0000001", "iter_0000002", "latest_checkpointed_iteration.txt"]
    assert checkpoint_names(run_dir) == names


def failing_writer(transforms, local_proc_idx, write_bucket, results_queue, count_queue, use_fsync, **_):
    results_queue.put((local_proc_idx, OSError("the disk is on fire")))
    count_queue.get()
    count_queue.task_done()


def test_a_rank_that_cannot_write_stops_all_and_the_next_save_works(ranks, tmp_path):
    ranks.run(fail_on_rank_1, tmp_path, world_size=2)


@pytest.mark.parametrize(("number", "end"), [(0, "status 3"), (1, "signal SIGXFSZ")])
def test_a_writer_that_dies_is_noticed_at_once_with_the_file_and_the_reason(monkeypatch, number, end):
    def write(transforms, at, bucket, results, *_, **__):
        if at == number == 0:
            raise SystemExit(3)
        if at == number:
            signal.signal(signal.SIGXFSZ, signal.SIG_DFL)
            os.kill(os.getpid(), signal.SIGXFSZ)
        results.put((at, ["written"]))

    monkeypatch.setattr(FileSystemWriterAsync, "write_preloaded_data", staticmethod(write))
    buckets = [(f"/run/__0_{at}.distcp", "key", ([], [])) for at in range(2)]
    found = getattr(sharded_io._written, "__wrapped__", sharded_io._written)(buckets, [], False)
    assert isinstance(found, ChildProcessError)
    assert str(found) == f"the process that wrote __0_{number}.distcp ended by {end}"


def lose_background_saves(run_dir: Path) -> None:
    """Lose the process that writes, and then the directory; after each loss, the next save works."""
    run = checkpointed_run.start(PLAIN, run_dir, steps=1, async_save=True)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sharded_io, "_written", lambda *_, **__: os.kill(os.getpid(), signal.SIGKILL))
        run.save(1)
        with raises("signal SIGKILL" if run.grid.rank == 0 else "rank 0 says why"):
            run.checkpointer.finish()
    run.save(1)
    run.checkpointer.finish()
    run.save(2)
    torch.distributed.barrier()
    if run.grid.rank == 0:
        run_dir.rename(run_dir.with_name("removed"))  # a writer may make a file while rmtree removes the others
    torch.distributed.barrier()
    with raises("was removed while a checkpoint was being written"):
        run.checkpointer.finish()
    run.save(3)
    run.checkpointer.finish()
    torch.distributed.barrier()
    assert checkpoint_names(run_dir) == ["iter_0000003", "latest_checkpointed_iteration.txt"]


@pytest.mark.parametrize("world_size", [pytest.param(1, marks=pytest.mark.full), 2])
def test_a_background_save_that_is_lost_is_an_error_and_the_next_save_works(ranks, tmp_path, world_size):
    ranks.run(lose_background_saves, tmp_path / "run", world_size=world_size)


def killed_in_a_save(run_dir: Path, async_save: bool) -> None:
    """Save step 1; then die while the writers of step 2 are half way, and leave them behind, stuck."""
    written, rank, num_writers = sharded_io._written.__wrapped__, os.getpid(), 0

    def write(buckets: Sequence[Any], *how: Any) -> Any:  # by writers that outlive the rank, unlike rank_worker.py's
        nonlocal num_writers
        num_writers = len(buckets)
        return written(buckets, *how)

    def half_written(transforms, local_proc_idx, write_bucket, *_: Any, **__: Any) -> None:
        Path(write_bucket[0]).write_bytes(b"half")
        (run_dir / f"writer_{os.getpid()}").touch()
        for descriptor in os.listdir("/proc/self/fd"):
            with contextlib.suppress(OSError):  # the pool waits for the rank's pipes to close
                os.close(int(descriptor))
        while len(list(run_dir.glob("writer_*"))) < num_writers:
            time.sleep(0.01)
        for pid in (rank, os.getppid()):
            if pid != 1:
                with contextlib.suppress(ProcessLookupError):
                    os.kill(pid, signal.SIGKILL)
        signal.pause()

    sharded_io._written = write
    run = checkpointed_run.start(PLAIN, run_dir, steps=1, async_save=async_save)
    run.save(1)
    run.checkpointer.finish()
    FileSystemWriterAsync.write_preloaded_data = staticmethod(half_written)
    run.step(2)
    run.save(2)
    run.checkpointer.finish()


def resume_and_save(run_dir: Path, step: int) -> None:
    run = checkpointed_run.start(dataclasses.replace(PLAIN, seed=1), run_dir)
    assert run.load_latest()["step"] == step
    run.step(step + 1)
    run.save(step + 1)


@pytest.mark.skipif(not Path("/proc/self/fd").exists(), reason="needs Linux's /proc")
@pytest.mark.parametrize("async_save", [pytest.param(False, marks=pytest.mark.full), True])
def test_kill_9_in_a_save_leaves_the_one_before(ranks, tmp_path, async_save):
    with pytest.raises(RankError, match="exit code -9"):
        ranks.run(killed_in_a_save, tmp_path, async_save, world_size=1)
    writers = [int(path.name.removeprefix("writer_")) for path in tmp_path.glob("writer_*")]
    assert writers
    try:
        ranks.run(resume_and_save, tmp_path, 1, world_size=1)
    finally:
        for writer in writers:
            os.kill(writer, signal.SIGKILL)
    ranks.run(resume_and_save, tmp_path, 2, world_size=1)
    steps = [f"iter_000000{step}" for step in (1, 2, 3)]
    assert checkpoint_names(tmp_path) == [*steps, "latest_checkpointed_iteration.txt"]


# A run that loses its directory while it saves, for instance while it is suspended, publishes nothing there


LOST = "no longer belongs to this run"


def lose_the_directory_in_mid_save(run_dir: Path, async_save: bool) -> None:
    from megatron_selfdistill.checkpoint import sharded_io
    from megatron_selfdistill.checkpoint.run_lock import RunLock

    lock = RunLock(run_dir)
    lock.acquire()
    run = checkpointed_run.start(Setup(teacher="current"), run_dir, keep_last=1, async_save=async_save, steps=1)
    run.checkpointer.prove_ownership = lock.renew
    run.save(1)
    run.checkpointer.finish()
    write_now = sharded_io.write_now

    def another_run_takes_the_directory() -> None:
        (run_dir / "lock").unlink(missing_ok=True)
        RunLock(run_dir).acquire()

    def while_suspended(*arguments: Any) -> None:
        another_run_takes_the_directory()
        write_now(*arguments)

    with mock.patch.object(sharded_io, "write_now", while_suspended), pytest.raises(CheckpointError, match=LOST):
        run.save(2)
        another_run_takes_the_directory()  # here only where the save goes on in the background
        run.checkpointer.finish()
    run.checkpointer.finish()  # as at the end of a run: nothing is published after all


@pytest.mark.parametrize("async_save", [False, True])
def test_a_run_that_loses_its_directory_in_mid_save_publishes_and_removes_nothing(ranks, tmp_path, async_save):
    ranks.run(lose_the_directory_in_mid_save, tmp_path, async_save, world_size=1)
    kept = [name for name in checkpoint_names(tmp_path) if not name.startswith(".writing_")]
    assert kept == ["iter_0000001", tiny_run.TRACKER] and tiny_run.saved_step(tmp_path) == 1


def lose_the_directory_before_the_teacher(run_dir: Path) -> None:
    def lost() -> None:
        raise CheckpointError(LOST)

    run = checkpointed_run.start(Setup(teacher="frozen"), run_dir, steps=1)
    run.checkpointer.prove_ownership = lost
    with pytest.raises(CheckpointError, match=LOST):
        run.save(1)
    assert not (run_dir / "teacher").exists()


def test_a_run_that_has_lost_its_directory_publishes_no_teacher(ranks, tmp_path):
    ranks.run(lose_the_directory_before_the_teacher, tmp_path, world_size=1)
