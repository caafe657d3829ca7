# Copyright (c) 2026 the megatron_selfdistill authors. Apache-2.0.
"""Checkpoints in both formats of the state that is no tensor: common.pt, and since Megatron Core 0.19 an object."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import checkpointed_run
import common_state
import layouts
import pytest
import torch
from checkpointed_run import Setup
from hf_contents import assert_same_tensors

from megatron_selfdistill.checkpoint.formats import directory, manifest
from megatron_selfdistill.checkpoint.formats.saved_run import is_selfdistill_checkpoint, read_saved_run
from megatron_selfdistill.checkpoint.formats.stored_model import stored_args
from megatron_selfdistill.checkpoint.formats.torch_dist import WRITTEN_WITH, read_common
from megatron_selfdistill.compat import older_megatron
from megatron_selfdistill.errors import CheckpointError
from megatron_selfdistill.interop.conversion import hf_to_megatron, megatron_to_hf
from megatron_selfdistill.interop.full_weights import open_weights

SETUP = Setup(teacher="frozen", reference=True)
FORMATS = {"common.pt": True, "an object": False}
in_both_formats = pytest.mark.parametrize("in_a_file", FORMATS.values(), ids=FORMATS)


def save(run_dir: Path) -> dict[str, Any]:
    run = checkpointed_run.start(SETUP, run_dir, steps=1)
    run.save(1, note="kept")
    return run.weights()


def resume(run_dir: Path) -> tuple[dict[str, Any], dict[str, Any], list[float]]:
    run = checkpointed_run.start(SETUP, run_dir)
    return run.load_latest(), run.weights(), [float(step) for step in run.adam_steps()]


@pytest.fixture(scope="module")
def saved(ranks, tmp_path_factory) -> tuple[Path, dict[str, Any]]:
    """Return a run directory with a checkpoint of step 1 and a frozen teacher, and the weights."""
    run_dir = tmp_path_factory.mktemp("saved")
    return run_dir, ranks.run(save, run_dir, world_size=1)[0]


def reformatted(saved: Path, target: Path, in_a_file: bool) -> Path:
    """Return a copy of a run directory with all its checkpoints in a format, and with manifests of their own."""
    shutil.copytree(saved, target)
    for metadata in list(target.rglob(".metadata")):
        common_state.reformat(metadata.parent, in_a_file=in_a_file)
        (metadata.parent / manifest.NAME).unlink()
        manifest.write(metadata.parent)
    return target


@in_both_formats
def test_a_run_resumes_from_both_formats_and_every_reader_reads_them(ranks, saved, tmp_path, in_a_file):
    run_dir = reformatted(saved[0], tmp_path / "run", in_a_file)
    path = run_dir / "checkpoints" / "iter_0000001"
    assert (path / "common.pt").exists() == in_a_file
    assert directory.incomplete(path) is None and directory.unverifiable(path) is None
    assert is_selfdistill_checkpoint(path) and read_saved_run(path).trainer_state["note"] == "kept"
    assert stored_args(path).num_layers == open_weights(path).args.num_layers
    ((state, weights, steps),) = ranks.run(resume, run_dir, world_size=1)
    assert (state["step"], state["note"]) == (1, "kept") and set(steps) == {1.0}
    found, expected = (layouts.join([each]) for each in (weights, saved[1]))
    assert found.keys() == expected.keys() and all(torch.equal(found[key], expected[key]) for key in expected)


@in_both_formats
def test_a_conversion_writes_and_reads_both_formats(hf_directory, tmp_path, monkeypatch, in_a_file):
    monkeypatch.setattr(older_megatron, "stores_common_file", lambda: in_a_file)
    release = hf_to_megatron(hf_directory("qwen3"), tmp_path / "megatron")
    assert (release / "common.pt").exists() == in_a_file and directory.incomplete(release) is None
    assert ("common_backend" in json.loads((release / "metadata.json").read_text())) == in_a_file
    assert_same_tensors(hf_directory("qwen3"), megatron_to_hf(tmp_path / "megatron", tmp_path / "back"))


NEWER = {"0.21": {WRITTEN_WITH: "0.21"}, "0.100": {WRITTEN_WITH: "0.100"}, "1.0": {WRITTEN_WITH: "1.0"}}
NEWER |= {"checkpoint_version 4.0": {"checkpoint_version": 4.0}}
"""What a refusal names -> the state of a newer Megatron; versions are compared as numbers."""
OLDER = ("0.9", "0.18", "0.19")


@in_both_formats
def test_a_checkpoint_of_a_newer_megatron_alone_is_refused_with_the_version(saved, tmp_path, in_a_file):
    path = reformatted(saved[0], tmp_path / "run", in_a_file) / "checkpoints" / "iter_0000001"
    common = common_state.read(path)
    (path / manifest.NAME).unlink()
    for named, changes in NEWER.items():
        common_state.write(path, common | changes)
        for read in (read_common, read_saved_run, stored_args):
            with pytest.raises(CheckpointError, match=named):
                read(path)
    for version in OLDER:
        common_state.write(path, common | {WRITTEN_WITH: version})
        assert read_common(path)[WRITTEN_WITH] == version


def test_a_newer_or_corrupt_format_of_the_tensors_is_refused(saved, tmp_path):
    path = reformatted(saved[0], tmp_path / "run", in_a_file=False) / "checkpoints" / "iter_0000001"
    newer = '{"sharded_backend": "torch_dist", "sharded_backend_version": 2}'
    for description, named in ((newer, "torch_dist 2"), ("{}", r"corrupt metadata\.json")):
        (path / "metadata.json").write_text(description)
        with pytest.raises(CheckpointError, match=named):
            directory.resolve(path)


def forget_object(path: Path) -> None:
    metadata = common_state.metadata_of(path)
    metadata.storage_data = {i: place for i, place in metadata.storage_data.items() if i.fqn != common_state.KEY}
    common_state.write_metadata(path, metadata)


def fill_object_with_zeros(path: Path) -> None:
    place = common_state.place_of(path)
    with (path / place.relative_path).open("r+b") as file:
        file.seek(place.offset)
        file.write(bytes(place.length))


DAMAGE: dict[str, tuple[bool, Callable[[Path], None], str]] = {
    "no common.pt": (True, lambda path: (path / "common.pt").unlink(), "has neither a common.pt nor"),
    "no object": (False, forget_object, "has neither a common.pt nor an object common_state"),
    "zeros": (False, fill_object_with_zeros, "common_state .*(corrupt|refused)"),
    "no dictionary": (False, lambda path: common_state.write(path, [1]), "corrupt common_state"),
}


@pytest.mark.parametrize("name", DAMAGE)
def test_state_that_is_missing_or_corrupt_is_one_message(saved, tmp_path, name):
    in_a_file, damage, message = DAMAGE[name]
    path = reformatted(saved[0], tmp_path / "run", in_a_file) / "checkpoints" / "iter_0000001"
    damage(path)
    (path / manifest.NAME).unlink()
    with pytest.raises(CheckpointError, match=message):
        directory.resolve(path)
        read_common(path)
