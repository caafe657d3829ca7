# Copyright (c) 2026 the megatron_selfdistill authors. Apache-2.0.
"""A checkpoint is data: whatever pickle in it asks for a function, the function is refused by name and never called."""

from __future__ import annotations

import io
import pickle
import re
import shutil
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
def run_dir(saved, tmp_path) -> Path:
    """Return a run directory with a frozen teacher and the checkpoint of step 1."""
    return Path(shutil.copytree(saved, tmp_path / "run"))


@pytest.fixture
def mark(tmp_path) -> Path:
    """Return the file that a payload would create."""
    return tmp_path / "executed"


def checkpoint(run_dir: Path) -> Path:
    return run_dir / "checkpoints" / "iter_0000001"


def poison_common(path: Path, mark: Path) -> None:
    common_state.write(path, common_state.read(path) | {"rerun_state_machine": Payload(mark)})


def poison_trainer_state(path: Path, mark: Path) -> None:
    common = common_state.read(path)
    common["selfdistill"]["trainer_state"] = pickle.dumps({"step": 1, "guards": Payload(mark)})
    common_state.write(path, common)


def nest_trainer_state(path: Path, mark: Path) -> None:
    common = common_state.read(path)
    common["selfdistill"]["trainer_state"] = "[" * 100_000
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


def poison_rng_state(path: Path, mark: Path) -> None:
    poison_object(path, mark, "selfdistill_rng_state")


def poison_extra_state(path: Path, mark: Path) -> None:
    poison_object(path, mark, "decoder.layers.self_attention.linear_qkv._extra_state")


def poison_weight(path: Path, mark: Path) -> None:
    poison_object(path, mark, "decoder.final_layernorm.weight")


def resume(run_dir: Path) -> str:
    run = checkpointed_run.start(FROZEN, run_dir)
    with pytest.raises(CheckpointError) as caught:
        run.load_latest()
    return str(caught.value)


REFUSED = ".*its pickle asks for posix.system"
POISONED = {
    "the state that is no tensor": (poison_common, REFUSED),
    "the trainer's state": (poison_trainer_state, "has a corrupt trainer_state"),  # it is no pickle
    "the trainer's state, nested deep": (nest_trainer_state, "has a corrupt trainer_state"),
    "the random states": (poison_rng_state, f"rng_state/shard_{REFUSED}"),
    "a layer's extra state": (poison_extra_state, f"_extra_state/shard_{REFUSED}"),
    ".metadata": (poison_metadata, f"has a .metadata that{REFUSED}"),
}


@pytest.mark.parametrize("name", POISONED)
def test_a_poisoned_checkpoint_is_refused_and_nothing_runs(ranks, run_dir, mark, name):
    poison, refusal = POISONED[name]
    poison(checkpoint(run_dir), mark)
    manifest.write(checkpoint(run_dir))  # its checksums are in order
    (message,) = ranks.run(resume, run_dir, world_size=1)
    assert re.search(refusal, message), message
    assert not mark.exists()


@pytest.mark.parametrize("poison", [poison_common, poison_metadata, poison_extra_state])
def test_a_poisoned_teacher_is_refused_and_nothing_runs(ranks, run_dir, mark, poison):
    poison(run_dir / "teacher", mark)
    manifest.write(run_dir / "teacher")
    (message,) = ranks.run(resume, run_dir, world_size=1)
    assert "teacher" in message and "its pickle asks for posix.system" in message
    assert not mark.exists()


@pytest.mark.parametrize("poison", [poison_metadata, poison_weight])
def test_starting_from_a_poisoned_checkpoint_is_refused_and_nothing_runs(ranks, run_dir, mark, poison):
    common = common_state.read(checkpoint(run_dir))
    del common["selfdistill"]
    common_state.write(checkpoint(run_dir), common)  # as another program's
    poison(checkpoint(run_dir), mark)
    (checkpoint(run_dir) / manifest.NAME).unlink()
    (message,) = ranks.run(checkpointed_run.refusal_of, checkpoint(run_dir), world_size=1)
    assert "posix.system" in message or "posix system" in message, message
    assert not mark.exists()


def test_a_poisoned_legacy_checkpoint_is_refused_and_nothing_runs(ranks, tmp_path, mark):
    file = tmp_path / "iter_0000001" / "mp_rank_00" / "model_optim_rng.pt"
    file.parent.mkdir(parents=True)
    torch.save({"model": {}, "args": Payload(mark)}, file)
    (message,) = ranks.run(checkpointed_run.refusal_of, tmp_path / "iter_0000001", world_size=1)
    assert "model_optim_rng.pt was refused: its pickle asks for posix.system" in message
    assert not mark.exists()


def read_by_others(run_dir: Path) -> None:
    """Check that a read restores PyTorch's readers, also after a failure."""
    from torch.distributed.checkpoint import DefaultLoadPlanner, FileSystemReader

    before = FileSystemReader.read_metadata, DefaultLoadPlanner.load_bytes
    resume(run_dir)
    assert (FileSystemReader.read_metadata, DefaultLoadPlanner.load_bytes) == before


def test_the_readers_of_the_process_are_restricted_for_the_while_only(ranks, run_dir, mark):
    poison_rng_state(checkpoint(run_dir), mark)
    manifest.write(checkpoint(run_dir))
    ranks.run(read_by_others, run_dir, world_size=1)


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
