# Copyright (c) 2026 the megatron_selfdistill authors. Apache-2.0.
"""Whole runs on one device: each equals another run to the last bit, or whole forward passes, or the plan's memory."""

from __future__ import annotations

import contextlib
import gc
import math
import os
import shutil
import sys
import warnings
from collections.abc import Iterator
from dataclasses import replace
from functools import partial
from pathlib import Path

import pytest
import tiny_run
import torch
import torch.distributed as dist
from children import Ranks
from taught import write_records_of_teachers

OF_DETERMINISM = {
    "CUDA_DEVICE_MAX_CONNECTIONS": "1",  # the order of launches under TP (distributed/ranks.py)
    "CUBLAS_WORKSPACE_CONFIG": ":4096:8",
    "NCCL_ALGO": "^NVLS",
}
"""Variables that CUDA and NCCL read when they start."""


@pytest.fixture(scope="module")
def process():
    """Return a function that calls a function in a process whose runs repeat their last bits, on a GPU, too."""
    # Packed float32 rows: see test_layouts.py.
    ranks = Ranks(1, ["transformer_engine"], OF_DETERMINISM | os.environ)
    yield lambda function, *arguments: ranks.run(function, *arguments)[0]
    ranks.close()


def train(rank: int, *runs: list[str]) -> None:
    """Run whole training runs in this process; raise where one does not end with 0."""
    for arguments in runs:
        with deterministic():
            status = tiny_run.start(arguments)
        gc.collect()
        if torch.cuda.is_available():
            torch.cuda.empty_cache()
        if status:
            raise RuntimeError(f"a run ended with status {status}, expected 0: {' '.join(arguments)}")


@contextlib.contextmanager
def deterministic() -> Iterator[None]:
    """Use kernels that repeat their last bits on GPUs; the kernels of a CPU always do."""
    if not torch.cuda.is_available():
        yield
        return
    before = torch.utils.deterministic.fill_uninitialized_memory
    torch.use_deterministic_algorithms(True, warn_only=True)
    torch.utils.deterministic.fill_uninitialized_memory = False
    try:
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", message=".*deterministic")
            yield
    finally:
        torch.use_deterministic_algorithms(False)
        torch.utils.deterministic.fill_uninitialized_memory = before


def differing_tensors(rank: int, one: Path, other: Path, num_steps: int) -> list[str]:
    """Return the names of the tensors of the checkpoints of two runs that differ."""
    from megatron_selfdistill.checkpoint.formats.directory import iteration_name
    from megatron_selfdistill.interop.torch_dist_tensors import TorchDistReader

    a, b = (TorchDistReader(path / "checkpoints" / iteration_name(num_steps)) for path in (one, other))
    assert a.shapes == b.shapes
    read = (
        (key, *(reader.read_at((key, ()), ()) for reader in (a, b))) for key in a.shapes if math.prod(a.shapes[key])
    )
    return [key for key, mine, theirs in read if not torch.equal(mine, theirs)]


def assert_equal(process, one: Path, other: Path, num_steps: int = 6) -> None:
    metrics = tiny_run.reproducible_metrics(one)
    assert len(metrics) == num_steps and metrics == tiny_run.reproducible_metrics(other)
    assert process(differing_tensors, one, other, num_steps) == []


def test_a_teacher_in_host_memory_changes_nothing(process, inputs, tmp_path):
    keys = ["teacher.weights=frozen", "checkpoint.save_every=6", "schedule.pair_order=teacher_first"]
    resident = tiny_run.overrides(inputs, tmp_path / "resident", *keys)
    elsewhere = ["teacher.offload=cpu", "schedule.teacher_store_gb=0"]  # its weights, and its rows
    process(train, resident, tiny_run.overrides(inputs, tmp_path / "offloaded", *keys, *elsewhere))
    assert_equal(process, tmp_path / "resident", tmp_path / "offloaded")


def test_two_teachers_that_are_fetched_beside_the_student_change_nothing(process, inputs, tmp_path):
    """A copy that overtook a pass on the device, or was read before its end, would change the numbers."""
    keys = [f"data.path={write_records_of_teachers(inputs, ['code', 'math'])}", "checkpoint.save_every=6"]
    keys += [f"teachers.{name}.load={tmp_path / name / 'checkpoints'}" for name in ("code", "math")]
    of_teachers = [
        tiny_run.overrides(inputs, tmp_path / name, "num_steps=1", "optimizer.lr=1e-2", f"seed={seed}")
        for seed, name in enumerate(("code", "math"), 1)
    ]
    fetched = tiny_run.overrides(inputs, tmp_path / "fetched", *keys)
    process(
        train, *of_teachers, fetched, tiny_run.overrides(inputs, tmp_path / "between", *keys, "teacher.offload=cpu")
    )
    assert_equal(process, tmp_path / "fetched", tmp_path / "between")


@pytest.mark.smoke
def test_a_run_that_resumes_from_a_save_in_the_background_equals_one_that_never_stopped(process, inputs, tmp_path):
    whole, halves = tmp_path / "whole", tmp_path / "halves"
    keys = ["checkpoint.async_save=true", "teacher.weights=ema"]
    process(train, tiny_run.overrides(inputs, whole, *keys))
    shutil.copytree(whole, halves)
    shutil.rmtree(halves / "checkpoints" / "iter_0000006")
    (halves / "checkpoints" / tiny_run.TRACKER).write_text("3")
    process(train, tiny_run.overrides(inputs, halves, *keys))
    assert_equal(process, whole, halves)


@pytest.mark.parametrize("cuda_graphs", [False, True])
def test_greedy_guided_tokens_are_the_best_of_two_whole_forward_passes(process, keeps, cuda_graphs):
    below, difference, count = process(guided_sampling, cuda_graphs)
    keeps("tokens below the best mixed logit", below, 1e-3)
    keeps("student's log-probs off whole passes, nats", difference, 1e-3)
    keeps("tokens", count, at_least=50)


def guided_sampling(rank: int, cuda_graphs: bool) -> tuple[float, float, int]:
    """Return how far tokens are below the best mixed logit, the error of their log-probs, and their number."""
    import decoding
    import guided_decoding
    import models

    from megatron_selfdistill.distributed import ranks
    from megatron_selfdistill.rollout.megatron import recorded_passes

    os.environ.setdefault("GLOO_SOCKET_IFNAME", "lo0" if sys.platform == "darwin" else "lo")
    backend = "nccl" if torch.cuda.is_available() else "gloo"
    dist.init_process_group(backend, store=dist.HashStore(), rank=0, world_size=1)
    chunks, grid = models.build(models.model_config(), models.parallel())
    model = chunks[0].eval()
    recorded_passes.COLUMNS = 4  # several recordings, and others where responses have ended
    params = replace(guided_decoding.GREEDY_PAIRS, stop_token_ids=tuple(range(models.VOCAB_SIZE // 8)))
    sampler = guided_decoding.guided_sampler_of(chunks, grid, cuda_graphs=cuda_graphs)
    requests = decoding.make_pairs(28)
    below, difference, count = 0.0, 0.0, 0
    for request, response in zip(requests, sampler.generate(requests, params), strict=True):
        student, teacher = decoding.both_logits(partial(decoding.logits_of, model), request, response.token_ids)
        mix, ids = 0.75 * teacher + student, torch.tensor(response.token_ids)[:, None]
        below = max(below, float((mix.amax(-1) - mix.gather(1, ids)[:, 0]).max()))
        stated = torch.tensor(response.log_probs, dtype=torch.float64)
        difference = max(difference, float((student.log_softmax(-1).gather(1, ids)[:, 0] - stated).abs().max()))
        count += len(response.token_ids)
    ranks.shutdown()
    return below, difference, count


PLANNED = (
    *("model.num_layers=16", "model.hidden_size=1024", "model.ffn_hidden_size=4096", "model.num_attention_heads=16"),
    *("model.num_query_groups=8", "model.vocab_size=65536", "model.make_vocab_size_divisible_by=128"),
    *("model.max_position_embeddings=4096", "model.init_method_std=0.02", "optimizer.lr=1e-5"),
    *("data.global_batch_size=64", "schedule.max_tokens=4096", "num_steps=2", "checkpoint.save_every=1000"),
    *("rollout.max_new_tokens=48", "rollout.kv_cache_gb=0.5", "cluster.num_gpus=1"),
)
"""0.4e9 parameters in bf16."""


def test_a_run_allocates_the_memory_that_the_plan_expects(process, inputs, tmp_path, keeps, on_gpu):
    if not on_gpu:
        pytest.skip("the plan is about a GPU's memory")
    from megatron_selfdistill.metrics.run_log import read_metrics

    arguments = [a for a in tiny_run.overrides(inputs, tmp_path / "run", *PLANNED) if a != "optimizer=fp32"]
    planner = Ranks(1, ["transformer_engine"])  # a process of its own, because the plan replaces the process group
    [expected] = planner.run(planned, arguments)
    planner.close()
    process(train_from_no_memory, arguments)
    peak = max(line["memory/peak_gib"] for line in read_metrics(tmp_path / "run"))
    keeps(f"allocated, to the planned {expected:.2f} GiB", peak / expected, 1.1, 0.6)


def planned(rank: int, arguments: list[str]) -> float:
    """Return the GiB that the plan expects while training, without the reserve."""
    from megatron_selfdistill import config as configuration
    from megatron_selfdistill.instruments.plan.dry_run import dry_run

    (memory,) = dry_run(configuration.load(arguments)).memory
    return sum(gib for name, gib in memory.training.items() if name != "reserved")


def train_from_no_memory(rank: int, arguments: list[str]) -> None:
    torch.cuda.reset_peak_memory_stats()
    train(rank, arguments)
