# Copyright (c) 2026 the megatron_selfdistill authors. Apache-2.0.
"""Saving and loading: what lies on disk, what is refused, and what a killed or failing save leaves behind."""

from __future__ import annotations

import contextlib
import dataclasses
import os
import shutil
import signal
import time
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace

import checkpointed_run
import layouts
import models
import pytest
import torch
from checkpointed_run import ADAM, Setup
from ranks import RankError
from tiers import combinations

from megatron_selfdistill.checkpoint.formats.unpickler import load_metadata

PLAIN = Setup(teacher="current")


def tensor_keys(path: Path) -> set[str]:
    from megatron.core import dist_checkpointing

    return set(dist_checkpointing.load_tensors_metadata(str(path)))


def checkpoint_names(run_dir: Path) -> list[str]:
    return sorted(path.name for path in (run_dir / "checkpoints").iterdir())


@contextlib.contextmanager
def raises(sentence: str) -> Iterator[None]:
    from megatron_selfdistill.errors import CheckpointError

    with pytest.raises(CheckpointError, match=sentence):
        yield


# What lies on disk


def save_three(run_dir: Path, async_save: bool) -> None:
    run = checkpointed_run.start(PLAIN, run_dir, keep_last=2, async_save=async_save)
    for step in (1, 2, 3):
        run.step(step)
        run.save(step)
    run.checkpointer.finish()
    assert run.checkpointer.latest() == run_dir / "checkpoints" / "iter_0000003"
    run.checkpointer.finish()  # nothing left to do


@pytest.mark.parametrize("async_save", [False, True])
def test_the_last_two_are_kept_and_nothing_else_is_left(ranks, tmp_path, async_save):
    ranks.run(save_three, tmp_path, async_save, world_size=2)
    expected = ["iter_0000002", "iter_0000003", "latest_checkpointed_iteration.txt"]
    assert checkpoint_names(tmp_path) == expected


def read_as_megatron(run_dir: Path) -> None:
    from megatron.core import dist_checkpointing

    checkpointed_run.start(Setup(kind="tied", teacher="ema"), run_dir, steps=1).save(7)
    path = run_dir / "checkpoints" / "iter_0000007"
    assert (run_dir / "checkpoints" / "latest_checkpointed_iteration.txt").read_text() == "7"
    common = dist_checkpointing.load_common_state_dict(str(path))  # torch.load(weights_only=True)
    assert (common["iteration"], common["checkpoint_version"]) == (7, 3.0)
    assert common["opt_param_scheduler"]["num_steps"] == 1
    assert common["content_metadata"]["distrib_optim_sharding_type"] == "fully_reshardable"
    args = common["args"]
    described = {
        "num_layers": 4,
        "hidden_size": 32,
        "ffn_hidden_size": 64,
        "num_attention_heads": 4,
        "num_query_groups": 2,
        "group_query_attention": True,
        "kv_channels": 8,
        "max_position_embeddings": 256,
        "seq_length": 256,
        "position_embedding_type": "rope",
        "use_rotary_position_embeddings": True,
        "rotary_base": 10000,
        "rotary_percent": 1.0,
        "add_bias_linear": False,
        "add_qkv_bias": True,
        "swiglu": True,
        "untie_embeddings_and_output_weights": False,
        "normalization": "RMSNorm",
        "layernorm_epsilon": 1e-5,
        "padded_vocab_size": 64,
        "num_experts": None,
        "ckpt_format": "torch_dist",
        "tensor_model_parallel_size": 1,
        "params_dtype": torch.float32,
    }
    assert {name: getattr(args, name) for name in described} == described
    layer = "decoder.layers."
    model_keys = {
        "embedding.word_embeddings.weight",
        "decoder.final_layernorm.weight",
        f"{layer}self_attention.linear_qkv.layer_norm_weight",
        f"{layer}self_attention.linear_qkv.weight",
        f"{layer}self_attention.linear_qkv.bias",
        f"{layer}self_attention.linear_proj.weight",
        f"{layer}mlp.linear_fc1.layer_norm_weight",
        f"{layer}mlp.linear_fc1.weight",
        f"{layer}mlp.linear_fc2.weight",
    }
    optimizer_keys = {f"optimizer.state.{s}.{k}" for s in ("param", "exp_avg", "exp_avg_sq") for k in model_keys}
    assert tensor_keys(path) == model_keys | optimizer_keys | {f"teacher.{k}" for k in model_keys}


def test_a_checkpoint_reads_as_one_of_megatron(ranks, tmp_path):
    ranks.run(read_as_megatron, tmp_path, world_size=1)


# Random states


def save_plain(setup: Setup, run_dir: Path) -> None:
    checkpointed_run.start(setup, run_dir).save(1)


RANDOM_STATES = {
    "DP 2": ({}, {"rng_state": ["0.0_1.1"], "selfdistill_rng_state": ["0.0.0_1.1.2", "0.0.1_1.1.2"]}),
    "TP 2": (
        {"tensor_model_parallel_size": 2},
        {"rng_state": ["0.0_1.2", "0.1_1.2"], "selfdistill_rng_state": ["0.0.0_1.2.1", "0.1.0_1.2.1"]},
    ),
    "EP 2": (
        {"expert_model_parallel_size": 2},
        {"rng_state": ["0.0.0_1.1.2", "0.0.1_1.1.2"], "selfdistill_rng_state": ["0.0.0_1.1.2", "0.0.1_1.1.2"]},
    ),
}
"""Layout -> the shards on disk: Megatron-LM's ``get_rng_state`` wants (pipeline, tensor), with experts also data."""


@pytest.mark.parametrize("layout", RANDOM_STATES)
def test_random_states_are_stored_as_megatron_lm_reads_them_and_for_every_rank(ranks, tmp_path, layout):
    sizes, expected = RANDOM_STATES[layout]
    setup = Setup(kind="moe" if "expert_model_parallel_size" in sizes else "gqa", teacher="current").cut(**sizes)
    ranks.run(save_plain, setup, tmp_path, world_size=2)
    stored = load_metadata(tmp_path / "checkpoints" / "iter_0000001").state_dict_metadata
    for key, shards in expected.items():
        assert sorted(name for name in stored if name.startswith(key)) == [f"{key}/shard_{shard}" for shard in shards]


SIZES = ("tp_size", "pp_size", "virtual_pipeline_model_parallel_size", "cp_size", "ep_size", "dp_size")


@pytest.mark.parametrize("name", SIZES)
def test_every_size_tells_one_layout_from_another(name):
    from megatron_selfdistill.checkpoint.run import state

    one = dict.fromkeys(SIZES, 2)
    assert state.layout(SimpleNamespace(**one)) != state.layout(SimpleNamespace(**(one | {name: 4})))


# Teachers


def save_frozen_teacher_once(run_dir: Path) -> None:
    teacher_files = run_dir / "teacher"
    run = checkpointed_run.start(Setup(teacher="frozen"), run_dir)
    run.step(1)
    run.save(1)
    inode = teacher_files.stat().st_ino
    run.step(2)
    run.save(2)
    assert not any("teacher" in key for key in tensor_keys(run_dir / "checkpoints" / "iter_0000002"))
    kept = run.teacher_weights()

    resumed = checkpointed_run.start(Setup(teacher="frozen", seed=3), run_dir)
    resumed.load_latest()
    assert layouts.worst_difference(layouts.join([resumed.teacher_weights()]), layouts.join([kept]))[0] == 0
    resumed.step(3)
    resumed.save(3)

    again = checkpointed_run.start(Setup(teacher="frozen"), run_dir)  # from the start, with the same weights
    again.save(1)
    assert teacher_files.stat().st_ino == inode

    other = checkpointed_run.start(Setup(teacher="frozen", seed=4), run_dir)
    other.save(4)
    assert teacher_files.stat().st_ino != inode
    with raises("not the teacher that this checkpoint was trained with"):
        other.load(run_dir / "checkpoints" / "iter_0000003")


def test_a_frozen_teacher_is_written_once_and_known_again(ranks, tmp_path):
    ranks.run(save_frozen_teacher_once, tmp_path, world_size=1)


def lose_the_teacher(run_dir: Path) -> None:
    run = checkpointed_run.start(Setup(teacher="frozen"), run_dir, steps=1)
    run.save(1)
    kept = layouts.join([run.teacher_weights()])
    for damage in (shutil.rmtree, lambda teacher: max(teacher.glob("*.distcp")).unlink()):
        damage(run_dir / "teacher")
        run.save(2)
        for step in (1, 2):
            resumed = checkpointed_run.start(Setup(teacher="frozen", seed=3), run_dir)
            assert resumed.load(run_dir / "checkpoints" / f"iter_{step:07d}")["step"] == step
            assert layouts.worst_difference(layouts.join([resumed.teacher_weights()]), kept)[0] == 0


def test_a_frozen_teacher_that_is_lost_is_written_again_for_old_and_new_checkpoints(ranks, tmp_path):
    ranks.run(lose_the_teacher, tmp_path, world_size=1)


def lose_the_manifest_of_the_teacher(run_dir: Path) -> None:
    checkpointed_run.start(Setup(teacher="frozen"), run_dir, steps=1).save(1)
    (run_dir / "teacher" / "manifest.json").unlink()
    run = checkpointed_run.start(Setup(teacher="frozen"), run_dir)
    with raises("teacher has no manifest.json, which this program saved with it"):
        run.load_latest()
    run.checkpointer.verify = "none"
    run.load_latest()


def test_a_frozen_teacher_without_its_manifest_is_refused_unless_asked_for(ranks, tmp_path):
    ranks.run(lose_the_manifest_of_the_teacher, tmp_path, world_size=1)


def frozen_teacher_in_another_layout(setup: Setup, run_dir: Path, save: bool) -> dict:
    from megatron_selfdistill.checkpoint.run.frozen_teacher import load_frozen_teacher, save_frozen_teacher

    run = checkpointed_run.start(dataclasses.replace(setup, seed=0 if save else 8), run_dir)
    if save:
        assert save_frozen_teacher(run_dir, run.teacher) == save_frozen_teacher(run_dir, run.teacher)
    else:
        load_frozen_teacher(run_dir, run.teacher)
    return run.teacher_weights()


def test_a_frozen_teacher_loads_in_another_layout(ranks, tmp_path):
    moe = Setup(kind="moe", teacher="frozen", optimizer=dataclasses.replace(ADAM, precision="bf16"))
    split = moe.cut(expert_model_parallel_size=2)
    saved = ranks.run(frozen_teacher_in_another_layout, split, tmp_path, True, world_size=2)
    loaded = ranks.run(frozen_teacher_in_another_layout, moe, tmp_path, False, world_size=1)
    assert layouts.worst_difference(layouts.join(loaded), layouts.join(saved))[0] == 0


def load_with_another_kind(run_dir: Path) -> None:
    checkpointed_run.start(Setup(teacher="ema"), run_dir).save(1)
    with raises("teacher.weights=ema, this run has frozen"):
        checkpointed_run.start(Setup(teacher="frozen"), run_dir).load_latest()
    plain = dataclasses.replace(ADAM, use_distributed_optimizer=False)
    with raises("use_distributed_optimizer=True, this run has False"):
        checkpointed_run.start(Setup(teacher="ema", optimizer=plain), run_dir).load_latest()
    with raises("does not fit this model: .*shape"):
        checkpointed_run.start(Setup(teacher="ema", model_changes={"num_layers": 2}), run_dir).load_latest()


def test_another_kind_of_run_is_refused(ranks, tmp_path):
    ranks.run(load_with_another_kind, tmp_path, world_size=1)


# Optimizers that have not stepped, or do not count steps


def save_before_the_first_step(setup: Setup, run_dir: Path) -> None:
    run = checkpointed_run.start(setup, run_dir)
    run.save(0)
    run.step(1)
    resumed = checkpointed_run.start(dataclasses.replace(setup, seed=6), run_dir)
    resumed.load_latest()
    resumed.step(1)
    worst = layouts.worst_difference(layouts.join([resumed.parameters()]), layouts.join([run.parameters()]))
    assert worst[0] == 0, worst
    fresh = checkpointed_run.start(setup, run_dir / "never saved")
    fresh.step(1)
    assert layouts.worst_difference(layouts.join([fresh.parameters()]), layouts.join([run.parameters()]))[0] == 0


@combinations(optimizer=["adam", "plain adam", "sgd", "sgd with momentum"], precision=["fp32", "bf16"], strength=1)
def test_a_save_before_the_first_step_changes_nothing_and_resumes(ranks, tmp_path, optimizer, precision):
    setup = dataclasses.replace(
        PLAIN,
        optimizer=dataclasses.replace(
            ADAM,
            precision=precision,
            optimizer=optimizer.split()[-1] if "adam" in optimizer else "sgd",
            sgd_momentum=0.9 if "momentum" in optimizer else 0.0,
            use_distributed_optimizer=optimizer == "adam",
        ),
    )
    ranks.run(save_before_the_first_step, setup, tmp_path, world_size=1)


def overlapped_weights_on_disk(run_dir: Path) -> tuple[dict, dict]:
    from megatron_selfdistill.checkpoint.run.external import load_weights

    overlapped = dataclasses.replace(ADAM, overlap_grad_reduce=True, overlap_param_gather=True)
    run = checkpointed_run.start(dataclasses.replace(PLAIN, optimizer=overlapped), run_dir, steps=1)
    path = run.save(1)
    fresh, _ = models.build(run.setup.model, run.setup.parallel, seed=2)
    assert load_weights(path, fresh) == 1
    return layouts.shards(fresh, lambda p: p.detach()), run.parameters()


def test_overlapped_parameters_are_gathered_before_they_are_saved(ranks, tmp_path):
    results = ranks.run(overlapped_weights_on_disk, tmp_path, world_size=2)
    on_disk, updated = (layouts.join([result[i] for result in results]) for i in (0, 1))
    assert layouts.worst_difference(on_disk, updated)[0] == 0


# Failures


def fail_on_rank_1(run_dir: Path) -> None:
    from megatron.core.dist_checkpointing.strategies.filesystem_async import FileSystemWriterAsync

    run = checkpointed_run.start(PLAIN.cut(tensor_model_parallel_size=2), run_dir, steps=1)
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


def lose_a_background_save(run_dir: Path) -> None:
    run = checkpointed_run.start(PLAIN, run_dir, steps=1, async_save=True)
    run.save(1)
    if run.grid.rank == 0:
        shutil.rmtree(run_dir)
    torch.distributed.barrier()
    with raises("was removed while a checkpoint was being written there in the background"):
        run.checkpointer.finish()
    run.save(2)
    run.checkpointer.finish()
    torch.distributed.barrier()
    assert checkpoint_names(run_dir) == ["iter_0000002", "latest_checkpointed_iteration.txt"]


@pytest.mark.parametrize("world_size", [1, 2])
def test_a_background_save_whose_directory_is_removed_is_an_error_unless_another_one_follows(
    ranks, tmp_path, world_size
):
    ranks.run(lose_a_background_save, tmp_path / "run", world_size=world_size)


def missing_psutil(run_dir: Path) -> None:
    with (
        pytest.MonkeyPatch.context() as patch,
        raises("need psutil"),
    ):
        patch.setattr("megatron.core.dist_checkpointing.strategies.filesystem_async.HAVE_PSUTIL", False)
        checkpointed_run.start(PLAIN, run_dir)


def test_a_missing_psutil_is_told_at_the_start(ranks, tmp_path):
    ranks.run(missing_psutil, tmp_path, world_size=1)


def killed_in_a_save(run_dir: Path, async_save: bool) -> None:
    """Save step 1; then die while the writers of step 2 are half way, and leave them behind, stuck."""
    from megatron.core.dist_checkpointing.strategies.filesystem_async import FileSystemWriterAsync

    run = checkpointed_run.start(PLAIN, run_dir, steps=1, async_save=async_save)
    run.save(1)
    run.checkpointer.finish()
    rank = os.getpid()

    def half_written(transforms, local_proc_idx, write_bucket, results_queue, count_queue, use_fsync, **_):
        Path(write_bucket[0]).write_bytes(b"half")
        (run_dir / f"writer_{local_proc_idx}").write_text(str(os.getpid()))
        for descriptor in os.listdir("/proc/self/fd"):
            with contextlib.suppress(OSError):  # the pool waits for the rank's pipes to close
                if not os.readlink(f"/proc/self/fd/{descriptor}").endswith(".lock"):
                    os.close(int(descriptor))
        time.sleep(0.3)  # let the other writer come as far
        for pid in (rank, os.getppid()):
            if pid != 1:
                with contextlib.suppress(ProcessLookupError):
                    os.kill(pid, signal.SIGKILL)
        time.sleep(600)

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
@pytest.mark.parametrize("async_save", [False, True])
def test_kill_9_in_a_save_leaves_the_one_before(ranks, tmp_path, async_save):
    directory = tmp_path / "checkpoints"
    with pytest.raises(RankError, match="exit code -9"):
        ranks.run(killed_in_a_save, tmp_path, async_save, world_size=1)
    writers = [int(path.read_text()) for path in tmp_path.glob("writer_*")]
    assert writers
    try:
        ranks.run(resume_and_save, tmp_path, 1, world_size=1)
        (left,) = directory.glob(".writing_iter_0000002_????????")
        assert any(path.suffix == ".distcp" for path in left.iterdir())  # its writers live: it is not touched
    finally:
        for writer in writers:
            os.kill(writer, signal.SIGKILL)
    time.sleep(0.1)
    ranks.run(resume_and_save, tmp_path, 2, world_size=1)
    steps = [f"iter_000000{step}" for step in (1, 2, 3)]
    assert checkpoint_names(tmp_path) == [*steps, "latest_checkpointed_iteration.txt"]
