# Copyright (c) 2026 the megatron_selfdistill authors. Apache-2.0.
"""Test which checkpoints count as complete, and that a crash at any moment leaves a checkpoint that loads."""

from __future__ import annotations

import os
import shutil
from pathlib import Path

import checkpointed_run
import pytest
from checkpointed_run import Setup

from megatron_selfdistill.checkpoint.formats import directory
from megatron_selfdistill.errors import CheckpointError


def save_one(run_dir: Path) -> None:
    checkpointed_run.start(Setup(teacher="current"), run_dir, steps=1).save(1)


@pytest.fixture(scope="module")
def complete(ranks, tmp_path_factory) -> Path:
    """Return a complete checkpoint."""
    run_dir = tmp_path_factory.mktemp("run")
    ranks.run(save_one, run_dir, world_size=1)
    return run_dir / "checkpoints" / "iter_0000001"


@pytest.fixture
def checkpoints(tmp_path, complete) -> Path:
    """Return a directory with the checkpoints 1 and 2, of which 2 is the latest."""
    for step in (1, 2):
        shutil.copytree(complete, tmp_path / directory.iteration_name(step))
    (tmp_path / directory.TRACKER).write_text("2")
    return tmp_path


def names(path: Path) -> list[str]:
    return sorted(entry.name for entry in path.iterdir())


def write(checkpoints: Path, step: int, complete: Path, keep_last: int | None = None) -> None:
    """Do the work of rank 0 around Megatron's writing of the files."""
    target = checkpoints / directory.iteration_name(step)
    temporary = directory.begin(checkpoints, target.name, 0)
    shutil.copytree(complete, temporary, dirs_exist_ok=True)
    directory.publish(temporary, target)
    directory.set_latest(target)
    directory.prune(target, keep_last)


def test_the_tracker_file_names_the_latest(checkpoints):
    assert directory.latest(checkpoints) == checkpoints / "iter_0000002"
    (checkpoints / directory.TRACKER).write_text("1")  # as Megatron's users go back
    assert directory.latest(checkpoints) == directory.resolve(checkpoints) == checkpoints / "iter_0000001"
    (checkpoints / directory.TRACKER).write_text("")  # unreadable: the newest one counts
    assert directory.latest(checkpoints) == checkpoints / "iter_0000002"


def test_a_run_directory_stands_for_its_checkpoints(checkpoints, complete, tmp_path):
    run_dir = complete.parent.parent
    assert directory.resolve(run_dir) == complete and directory.find(run_dir) == (complete, False)
    assert directory.of_iteration(run_dir, 1) == complete
    (tmp_path / directory.CHECKPOINTS).mkdir()
    assert directory.resolve(checkpoints) == checkpoints / "iter_0000002", "a tracker file of its own is the nearer one"


def cut_off(file: Path, num_bytes: int) -> None:
    file.write_bytes(file.read_bytes()[:-num_bytes])


DAMAGE = {
    "a data file one byte short": lambda path: cut_off(path / "__0_0.distcp", 1),
    "a data file missing": lambda path: max(path.glob("*.distcp")).unlink(),
    "no metadata.json": lambda path: (path / "metadata.json").unlink(),
    "no .metadata": lambda path: (path / ".metadata").unlink(),
    ".metadata cut off": lambda path: cut_off(path / ".metadata", 9),
    "all gone": shutil.rmtree,
}


@pytest.mark.parametrize("damage", DAMAGE)
def test_a_damaged_checkpoint_is_not_the_latest(checkpoints, damage):
    DAMAGE[damage](checkpoints / "iter_0000002")
    assert directory.latest(checkpoints) == checkpoints / "iter_0000001"
    with pytest.raises(CheckpointError, match="iter_0000002"):
        directory.resolve(checkpoints)


@pytest.mark.parametrize("keep_last, left", [(1, [3]), (2, [2, 3]), (None, [1, 2, 3])])
def test_the_last_checkpoints_are_kept_and_after_going_back_also_later_ones(checkpoints, complete, keep_last, left):
    shutil.copytree(complete, checkpoints / "iter_0000009")
    write(checkpoints, 3, complete, keep_last)
    assert names(checkpoints) == [*map(directory.iteration_name, [*left, 9]), directory.TRACKER]
    assert directory.latest(checkpoints) == checkpoints / "iter_0000003"


class Crash(BaseException):
    """The process dies here: no handler of ours runs for it."""


def crash_at(patch: pytest.MonkeyPatch, count: int) -> None:
    """Raise `Crash` instead of the ``count``-th change of the file system from now on, and of all later changes."""
    left = [count]

    def dying(original):
        def call(*args, **kwargs):
            left[0] -= 1
            if left[0] < 0:
                raise Crash
            return original(*args, **kwargs)

        return call

    changes = [(Path, "rename"), (Path, "unlink"), (Path, "write_text"), (os, "replace"), (directory, "sync")]
    for owner, name in [*changes, (os, "unlink"), (os, "rmdir")]:  # the last two are rmtree's
        patch.setattr(owner, name, dying(getattr(owner, name)))


@pytest.mark.parametrize("step", [2, 3], ids=["same step again", "next step"])
def test_a_crash_at_any_moment_leaves_a_latest_that_loads(checkpoints, complete, step):
    finished, count = False, 0
    while not finished:
        with pytest.MonkeyPatch.context() as patch:
            crash_at(patch, count)
            try:
                write(checkpoints, step, complete, keep_last=1)
                finished = True
            except Crash:
                count += 1
        latest = directory.latest(checkpoints)
        assert latest is not None and directory.incomplete(latest) is None, count
        assert directory.iteration_of(latest) in (2, step)
        if directory.iteration_of(latest) == step and step == 3:
            shutil.rmtree(checkpoints / "iter_0000003")  # crash once more on the way to the first one
            shutil.copytree(complete, checkpoints / "iter_0000002", dirs_exist_ok=True)
            (checkpoints / directory.TRACKER).write_text("2")
    assert count > 10
    write(checkpoints, 4, complete, keep_last=1)
    assert names(checkpoints) == ["iter_0000004", directory.TRACKER]


def test_a_disk_that_is_too_small_is_reported_before_writing(tmp_path):
    with pytest.raises(CheckpointError, match=r"needs 1,000,000,000,000,000,000 bytes"):
        directory.begin(tmp_path, "iter_0000001", 10**18)
    assert names(tmp_path) == []


def test_leftovers_of_the_same_kind_are_removed(tmp_path):
    dead = directory.begin(tmp_path, "iter_0000001", 0)
    (dead / "half.distcp").write_text("half")
    other = directory.begin(tmp_path, "converted", 0)
    same = directory.begin(tmp_path, "converted", 0)
    longer = directory.begin(tmp_path, "converted_too", 0)
    assert dead.exists() and not other.exists()
    new = directory.begin(tmp_path, "iter_0000002", 0)
    assert names(tmp_path) == sorted([new.name, same.name, longer.name])
