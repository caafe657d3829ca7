# Copyright (c) 2026 the megatron_selfdistill authors. Apache-2.0.
"""A frozen teacher is saved once beside the checkpoints, known again, and written again where it is lost."""

from __future__ import annotations

import dataclasses
import shutil
from pathlib import Path

import checkpointed_run
import layouts
import pytest
from checkpointed_run import Setup
from saved_checkpoints import raises, tensor_keys

FROZEN = Setup(teacher="frozen", model_changes={"num_layers": 2})


def save_and_lose_the_teacher(run_dir: Path) -> None:
    teacher, checkpoints = run_dir / "teacher", run_dir / "checkpoints"
    run = checkpointed_run.start(FROZEN, run_dir)
    run.step(1)
    run.save(1)
    inode = teacher.stat().st_ino
    run.step(2)
    run.save(2)
    assert not any("teacher" in key for key in tensor_keys(checkpoints / "iter_0000002"))
    checkpointed_run.start(FROZEN, run_dir).save(1)  # from the start, with the same weights
    assert teacher.stat().st_ino == inode, "it was written again"

    kept = layouts.join([run.teacher_weights()])
    for damage in (shutil.rmtree, lambda teacher: max(teacher.glob("*.distcp")).unlink(), lambda teacher: None):
        damage(teacher)
        run.save(2)
        for step in (1, 2):
            resumed = checkpointed_run.start(dataclasses.replace(FROZEN, seed=3), run_dir)
            assert resumed.load(checkpoints / f"iter_{step:07d}")["step"] == step
            assert layouts.worst_difference(layouts.join([resumed.teacher_weights()]), kept)[0] == 0

    (teacher / "manifest.json").unlink()
    with raises("teacher has no manifest.json"):
        resumed.load_latest()
    resumed.checkpointer.config = dataclasses.replace(resumed.checkpointer.config, verify="none")
    resumed.load_latest()
    other = checkpointed_run.start(dataclasses.replace(FROZEN, seed=4), run_dir)
    other.save(4)
    with raises("not the teacher of this checkpoint"):
        other.load(checkpoints / "iter_0000002")


def test_a_frozen_teacher_is_written_once_and_known_again_and_a_lost_one_is_written_again(ranks, tmp_path):
    ranks.run(save_and_lose_the_teacher, tmp_path, world_size=1)


def keep_a_reference(setup: Setup, run_dir: Path) -> None:
    run = checkpointed_run.start(setup, run_dir, steps=1)
    run.save(1)
    kept = layouts.join([run.reference_weights()])
    assert layouts.worst_difference(layouts.join([run.weights()]), kept)[0] > 0, "the student must have moved"

    resumed = checkpointed_run.start(dataclasses.replace(setup, seed=3), run_dir)
    resumed.load_latest()
    assert layouts.worst_difference(layouts.join([resumed.reference_weights()]), kept)[0] == 0
    assert layouts.worst_difference(layouts.join([resumed.teacher_weights()]), kept)[0] > 0

    checkpointed_run.start(dataclasses.replace(setup, seed=4), run_dir).save(4)  # of a later start
    with raises("not the teacher of this checkpoint"):
        resumed.load(run_dir / "checkpoints" / "iter_0000001")


@pytest.mark.parametrize("teacher", ["ema", pytest.param("current", marks=pytest.mark.full)])
def test_a_reference_beside_another_teacher_is_kept_like_a_frozen_teacher(ranks, tmp_path, teacher):
    setup = dataclasses.replace(FROZEN, teacher=teacher, reference=True)
    ranks.run(keep_a_reference, setup, tmp_path, world_size=1)
