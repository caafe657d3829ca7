# Copyright (c) 2026 the megatron_selfdistill authors. Apache-2.0.
"""A run that loses its run directory while it saves, for instance while it is suspended, publishes nothing there."""

from __future__ import annotations

from pathlib import Path
from typing import Any
from unittest import mock

import checkpointed_run
import pytest
import tiny_run
from checkpointed_run import Setup
from saved_checkpoints import checkpoint_names

from megatron_selfdistill.errors import CheckpointError

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
