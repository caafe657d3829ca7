# Copyright (c) 2026 the megatron_selfdistill authors. Apache-2.0.
"""A checkpoint is data: whatever pickle in it asks for a function, the function is refused by name and never called."""

from __future__ import annotations

import io
import pickle
import re
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import checkpointed_run
import common_state
import pytest
import torch
from checkpointed_run import Setup
from damage import Payload

from megatron_selfdistill.checkpoint.formats import manifest
from megatron_selfdistill.errors import CheckpointError

FROZEN = Setup(teacher="frozen")


def save(run_dir: Path) -> None:
    checkpointed_run.start(FROZEN, run_dir, steps=1).save(1)


@pytest.fixture(scope="module")
def saved(ranks, tmp_path_factory) -> Path:
    run_dir = tmp_path_factory.mktemp("run") / "run"
    ranks.run(save, run_dir, world_size=1)
    return run_dir


@pytest.fixture
def mark(tmp_path) -> Path:
    """Return the file that a payload would create."""
    return tmp_path / "executed"


def checkpoint(run_dir: Path) -> Path:
    return run_dir / "checkpoints" / "iter_0000001"


def poison_common(path: Path, mark: Path) -> None:
    common_state.write(path, common_state.read(path) | {"rerun_state_machine": Payload(mark)})


def trainer_state(path: Path, state: object) -> None:
    common = common_state.read(path)
    common["selfdistill"]["trainer_state"] = state
    common_state.write(path, common)


def poison_metadata(path: Path, mark: Path) -> None:
    metadata = pickle.loads((path / ".metadata").read_bytes())
    metadata.planner_data = Payload(mark)
    (path / ".metadata").write_bytes(pickle.dumps(metadata))


def poison_object(path: Path, mark: Path, name: str) -> None:
    """Let an entry of a .distcp file hold the payload."""
    keys = (index.fqn for index in common_state.metadata_of(path).storage_data)
    key = next(key for key in keys if key.removeprefix("teacher.").startswith(name))
    common_state.write_object(path, key, Payload(mark))


RANDOM_STATE, WEIGHT = "selfdistill_rng_state", "decoder.final_layernorm.weight"
EXTRA_STATE = "decoder.layers.self_attention.linear_qkv._extra_state"
REFUSED = ".*its pickle asks for posix.system"
Poison = Callable[[Path, Path], None]
POISONED: dict[str, tuple[Poison, str]] = {
    "the state that is no tensor": (poison_common, REFUSED),
    "the trainer's state, which is no pickle": (
        lambda path, mark: trainer_state(path, pickle.dumps({"step": 1, "guards": Payload(mark)})),
        "has a corrupt trainer_state",
    ),
    "nested deep": (lambda path, mark: trainer_state(path, "[" * 100_000), "has a corrupt trainer_state"),
    "the random states": (lambda path, mark: poison_object(path, mark, RANDOM_STATE), f"rng_state/shard_{REFUSED}"),
    "a layer's extra state": (
        lambda path, mark: poison_object(path, mark, EXTRA_STATE),
        f"_extra_state/shard_{REFUSED}",
    ),
    ".metadata": (poison_metadata, f"has a .metadata that{REFUSED}"),
}
"""What is poisoned -> how, and what the refusal names."""
OF_THE_TEACHER = ["the state that is no tensor", "a layer's extra state", ".metadata"]


def resume_each(run_dirs: list[Path]) -> list[str]:
    """Return the refusals of runs that resume; check that PyTorch's readers are as before."""
    from torch.distributed.checkpoint import DefaultLoadPlanner, FileSystemReader

    before, messages = (FileSystemReader.read_metadata, DefaultLoadPlanner.load_bytes), []
    for run_dir in run_dirs:
        run = checkpointed_run.start(FROZEN, run_dir)
        with pytest.raises(CheckpointError) as caught:
            run.load_latest()
        messages.append(str(caught.value))
        assert (FileSystemReader.read_metadata, DefaultLoadPlanner.load_bytes) == before
    return messages


def test_a_poisoned_checkpoint_or_teacher_is_refused_and_nothing_runs(ranks, saved, tmp_path, mark):
    cases = [(name, "checkpoint") for name in POISONED] + [(name, "teacher") for name in OF_THE_TEACHER]
    run_dirs = [Path(shutil.copytree(saved, tmp_path / f"run {number}")) for number in range(len(cases))]
    for (name, where), run_dir in zip(cases, run_dirs, strict=True):
        path = run_dir / "teacher" if where == "teacher" else checkpoint(run_dir)
        POISONED[name][0](path, mark)
        manifest.write(path)  # its checksums are in order
    (messages,) = ranks.run(resume_each, run_dirs, world_size=1)
    for (name, where), message in zip(cases, messages, strict=True):
        assert re.search(POISONED[name][1], message) and (where != "teacher" or "teacher" in message), (name, message)
    assert not mark.exists()


@pytest.mark.parametrize("what", [".metadata", "a weight"])
def test_starting_from_a_poisoned_checkpoint_is_refused_and_nothing_runs(ranks, saved, tmp_path, mark, what):
    path = checkpoint(Path(shutil.copytree(saved, tmp_path / "run")))
    common = common_state.read(path)
    del common["selfdistill"]
    common_state.write(path, common)  # as another program's
    if what == ".metadata":
        poison_metadata(path, mark)
    else:
        poison_object(path, mark, WEIGHT)
    (path / manifest.NAME).unlink()
    (message,) = ranks.run(checkpointed_run.refusal_of, path, world_size=1)
    assert "posix.system" in message or "posix system" in message, message
    assert not mark.exists()


def test_a_poisoned_legacy_checkpoint_is_refused_and_nothing_runs(ranks, tmp_path, mark):
    file = tmp_path / "iter_0000001" / "mp_rank_00" / "model_optim_rng.pt"
    file.parent.mkdir(parents=True)
    torch.save({"model": {}, "args": Payload(mark)}, file)
    (message,) = ranks.run(checkpointed_run.refusal_of, tmp_path / "iter_0000001", world_size=1)
    assert "model_optim_rng.pt was refused: its pickle asks for posix.system" in message
    assert not mark.exists()


def test_statistics_of_transformer_engine_are_pickled_again_and_poisoned_ones_refused(mark):
    """Its layers unpickle their extra state without a restriction."""
    from megatron_selfdistill.checkpoint.sharded_io import _rewrite_extra_states

    def as_tensor(value: Any) -> torch.Tensor:
        return torch.frombuffer(bytearray(pickle.dumps(value)), dtype=torch.uint8)

    state = {"scale_fwd": torch.arange(3.0), "extra_fp8_variables": {"fp8_checkpoint": True}}
    saved_by_torch = io.BytesIO()
    torch.save(state, saved_by_torch)
    empty = torch.empty(0, dtype=torch.uint8)
    loaded = {"model": {"a._extra_state": as_tensor(state), "b._extra_state": saved_by_torch, "c._extra_state": empty}}
    _rewrite_extra_states(loaded)
    first, second, third = loaded["model"].values()
    for found in (pickle.loads(first.numpy().tobytes()), torch.load(second, weights_only=True)):
        assert torch.equal(found["scale_fwd"], state["scale_fwd"])
        assert found["extra_fp8_variables"] == state["extra_fp8_variables"]
    assert third is empty
    poisoned = io.BytesIO()
    torch.save(Payload(mark), poisoned)
    for value in (as_tensor(Payload(mark)), poisoned):
        for name in ("a._extra_state", "mlp.experts.linear_fc1._extra_state3"):  # grouped experts have one each
            with pytest.raises(CheckpointError, match=f"{name} was refused: its pickle asks for posix.system"):
                _rewrite_extra_states({"teacher0": {name: value}})
    assert not mark.exists()


def read_statistics(directory: Path, mark: Path) -> None:
    from megatron.core.dist_checkpointing.mapping import ShardedObject

    from megatron_selfdistill.checkpoint import sharded_io

    def contents(value: Any) -> dict[str, Any]:
        return {"model": {"x._extra_state": ShardedObject("x._extra_state", value, (1,), (0,), replica_id=0)}}

    statistics = torch.frombuffer(bytearray(pickle.dumps(Payload(mark))), dtype=torch.uint8)
    target = directory / "iter_0000001"
    sharded_io.write_now(sharded_io.begin_write(contents(statistics), target)[0], target)
    with pytest.raises(CheckpointError, match=r"x._extra_state was refused: its pickle asks for posix.system"):
        sharded_io.read(contents(None), target)


def test_poisoned_statistics_do_not_reach_a_layer(ranks, tmp_path, mark):
    ranks.run(read_statistics, tmp_path, mark, world_size=1)
    assert not mark.exists()
