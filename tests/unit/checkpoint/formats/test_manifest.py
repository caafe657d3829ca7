# Copyright (c) 2026 the megatron_selfdistill authors. Apache-2.0.
"""Every checkpoint says what it must be; a torn one is named, and the newest whole one is taken or offered instead."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import checkpointed_run
import common_state
import models
import pytest
import torch.distributed as dist
from checkpointed_run import Setup
from damage import flip_bit

from megatron_selfdistill.checkpoint import sharded_io
from megatron_selfdistill.checkpoint.formats import directory, manifest
from megatron_selfdistill.config import ParallelConfig
from megatron_selfdistill.errors import CheckpointError

PLAIN = Setup(teacher="current")


def save_two(run_dir: Path) -> None:
    run = checkpointed_run.start(PLAIN.cut(tp=2), run_dir)
    for step in (1, 2):
        run.step(step)
        run.save(step)


@pytest.fixture(scope="module")
def saved(ranks, tmp_path_factory) -> Path:
    run_dir = tmp_path_factory.mktemp("run")
    ranks.run(save_two, run_dir, world_size=2)
    return run_dir


@pytest.fixture
def run_dir(saved, tmp_path) -> Path:
    """Return a run directory with the checkpoints of steps 1 and 2."""
    return Path(shutil.copytree(saved, tmp_path / "run"))


def newest(run_dir: Path) -> Path:
    return run_dir / "checkpoints" / "iter_0000002"


def distcp(path: Path) -> Path:
    return max(path.glob("*.distcp"), key=lambda file: file.stat().st_size)


# What is in it


def test_it_holds_every_file_as_it_is(saved):
    path = newest(saved)
    entries = manifest.read(path)
    assert entries is not None
    assert set(entries) == {file.name for file in path.iterdir()} - {manifest.NAME}
    assert {".metadata", "metadata.json"} < set(entries) and len(entries) > 3
    assert all(manifest.checksum(path / name) == entry for name, entry in entries.items())


# What is found


def cut_off(path: Path, name: str) -> None:
    (path / name).write_bytes((path / name).read_bytes()[:-7])


def lose(path: Path, name: str) -> None:
    (path / name).unlink()


DAMAGES: dict[str, Callable[[Path], str | None]] = {
    "cut off": lambda path: cut_off(path, distcp(path).name),
    "a bit flipped": lambda path: flip_bit(distcp(path)),
    "a bit of the common state flipped": common_state.flip_bit_in,
    "no data": lambda path: lose(path, distcp(path).name),
    "no .metadata": lambda path: lose(path, ".metadata"),
    "a damaged manifest": lambda path: cut_off(path, manifest.NAME),
    "no manifest": lambda path: lose(path, manifest.NAME),
}
NAMED = {"no .metadata": ".metadata", "a damaged manifest": manifest.NAME, "no manifest": manifest.NAME}
"""Damage -> the file that a refusal names, beside the data and what the damage returns."""


def outcomes_of_damage(run_dirs: list[Path]) -> list[tuple[int, int | None, list[str]]]:
    """Return for each run where it goes on, with and without verification, and the refusals of its newest checkpoint.

    The step without verification is None where the checkpoint has its manifest.
    """
    found = []
    for run_dir in run_dirs:
        run = checkpointed_run.start(PLAIN, run_dir)
        step, unverified = run.load_latest()["step"], None
        if not (newest(run_dir) / manifest.NAME).exists():
            run.checkpointer.config = replace(run.checkpointer.config, verify="none")
            unverified = run.load_latest()["step"]
        refusals = [checkpointed_run.refusal_of(path) for path in (newest(run_dir), newest(run_dir).parent)]
        found.append((step, unverified, refusals))
    return found


def test_a_torn_checkpoint_is_named_and_a_run_takes_the_one_before(ranks, saved, tmp_path):
    run_dirs = [Path(shutil.copytree(saved, tmp_path / name)) for name in DAMAGES]
    named = []
    for (name, damage), run_dir in zip(DAMAGES.items(), run_dirs, strict=True):
        data = distcp(newest(run_dir)).name
        named.append(damage(newest(run_dir)) or NAMED.get(name, data))
    (found,) = ranks.run(outcomes_of_damage, run_dirs, world_size=1)
    for name, file, (step, unverified, refusals) in zip(DAMAGES, named, found, strict=True):
        assert step == 1 and unverified == (2 if name == "no manifest" else None), name
        assert len(refusals) == 2 and all(file in refusal for refusal in refusals), refusals


def faults_of_damaged_files(path: Path, names: list[str]) -> list[str | None]:
    """Return what all ranks together find where one file after the other is damaged, and then where none is."""
    found = []
    for name in names:
        if dist.get_rank() == 0:
            flip_bit(path / name, 200, 1)
        found.append(sharded_io.integrity_fault(path, "checksums"))
        if dist.get_rank() == 0:
            flip_bit(path / name, 200, 1)
    return [*found, sharded_io.integrity_fault(path, "checksums")]


def test_ranks_that_share_the_files_find_damage_in_each_of_them(ranks, run_dir):
    path = newest(run_dir)
    names = [*(file.name for file in path.glob("common.pt")), *sorted(file.name for file in path.glob("*.distcp"))]
    for found in ranks.run(faults_of_damaged_files, path, names, world_size=2):
        assert found.pop() is None
        assert all(f"corrupt {name}:" in fault for name, fault in zip(names, found, strict=True)), found


@pytest.mark.parametrize("place", [0, 2**20 - 1, 2**20, 2 * 2**20 + 5])
def test_a_flipped_bit_changes_the_checksum_in_every_block_of_a_file(tmp_path, place):
    file = tmp_path / "file"
    file.write_bytes(bytes(2 * 2**20 + 6))
    before = manifest.checksum(file)
    with file.open("r+b") as stream:
        stream.seek(place)
        stream.write(b"\1")
    after = manifest.checksum(file)
    assert after.size == before.size == 2 * 2**20 + 6 and after.checksum != before.checksum


def start_from_another_programs(path: Path) -> None:
    from megatron_selfdistill.checkpoint.external import load_weights

    common = common_state.read(path)
    del common["selfdistill"]
    common_state.write(path, common)
    (path / manifest.NAME).unlink()
    chunks, _ = models.build(models.model_config("gqa"), ParallelConfig(), seed=9)
    assert load_weights(path, chunks) == 2
    file = distcp(path)
    file.write_bytes(file.read_bytes()[: file.stat().st_size // 2])  # Megatron's own metadata tells this
    with pytest.raises(CheckpointError, match=r"only a part of .*distcp"):
        load_weights(path, chunks)


def test_a_checkpoint_without_manifest_of_another_program_is_taken(ranks, run_dir):
    ranks.run(start_from_another_programs, newest(run_dir), world_size=1)


def test_a_manifest_may_not_name_files_of_other_directories(tmp_path):
    for name in ("../outside", "/etc/hostname", "a/b", ".."):
        entries = {name: {"size": 1, "checksum": ""}}
        (tmp_path / manifest.NAME).write_text(json.dumps({"version": 1, "algorithm": "xxh3_128", "files": entries}))
        with pytest.raises(CheckpointError, match=r"corrupt manifest\.json"):
            manifest.read(tmp_path)


# A disk that is full


def fill_up(run_dir: Path, async_save: bool) -> None:
    run = checkpointed_run.start(PLAIN, run_dir, steps=1, async_save=async_save)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("shutil.disk_usage", lambda path: type("Usage", (), {"free": 2**40}))
        with pytest.raises(CheckpointError, match="could not write"):
            for step in range(1, 9):
                run.save(step)
                run.checkpointer.finish()
    assert run.checkpointer.latest() == newest(run_dir).with_name(f"iter_{step - 1:07d}")


@pytest.mark.parametrize("async_save", [pytest.param(False, marks=pytest.mark.full), True])
def test_a_full_disk_stops_the_run_and_leaves_the_one_before(ranks, small_disk, async_save):
    disk = small_disk("3m")
    ranks.run(fill_up, disk, async_save, world_size=1)
    names = [path.name for path in (disk / "checkpoints").iterdir() if path.name.startswith("iter_")]
    assert names and all(directory.incomplete(disk / "checkpoints" / name) is None for name in names)
