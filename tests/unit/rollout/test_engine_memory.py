# Copyright (c) 2026 the megatron_selfdistill authors. Apache-2.0.
"""The share of a GPU for an engine beside a trainer, and the shares that are refused."""

from __future__ import annotations

import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from megatron_selfdistill.config import RolloutConfig
from megatron_selfdistill.engines.vllm import colocated, engine_memory
from megatron_selfdistill.engines.vllm.engine_memory import (
    MARGIN_BYTES,
    DeviceMemory,
    memory_of_visible_gpus,
)

GIB = 2**30
# (free, total) of a GPU on which recipe=qwen3_8b has built its trainer.
TRAINERS_GPUS = {"80 GiB": (58.7, 80.0), "H200": (119.3, 139.8)}


def memory_of(gpu: str) -> DeviceMemory:
    free, total = TRAINERS_GPUS[gpu]
    return DeviceMemory(int(free * GIB), int(total * GIB))


@pytest.mark.parametrize("gpu", TRAINERS_GPUS)
def test_the_share_is_what_is_free_less_the_margin(gpu):
    memory = memory_of(gpu)
    assert memory.share * memory.total == pytest.approx(memory.free - MARGIN_BYTES)
    assert 0 < memory.share < 0.92


@pytest.mark.parametrize(("engine_args", "share"), [({}, None), ({"gpu_memory_utilization": 0.5}, 0.5)])
def test_a_colocated_engine_takes_what_the_trainer_leaves_unless_the_user_sets_its_share(
    monkeypatch, engine_args, share
):
    """Of the GPU's memory 58.7 GiB are free."""
    recorded: dict[str, Any] = {}
    monkeypatch.setattr(colocated, "_least_memory", lambda grid: memory_of("80 GiB"))
    monkeypatch.setattr(colocated, "_engine_on_all_ranks", lambda *args, settings, **options: recorded.update(settings))
    grid: Any = SimpleNamespace(device=torch.device("cuda"), world_size=1, rank=0)
    weights: Any = SimpleNamespace(transformer=SimpleNamespace(params_dtype=torch.bfloat16), adapter=None)
    rollout = RolloutConfig(engine="vllm", kv_cache_gb=16.0, engine_args=engine_args)
    colocated.ColocatedSampler(weights, grid, Path("model"), rollout, vocab_size=100, max_length=64)
    assert recorded["gpu_memory_utilization"] == (share or memory_of("80 GiB").share)
    assert recorded["kv_cache_memory_bytes"] == 16 * GIB


def test_gpus_are_looked_at_by_a_process_that_ends(monkeypatch, tmp_path):
    python = tmp_path / "python"
    python.write_text('#!/bin/sh\n[ "$3" = 2 ] && echo "[[50, 80], [40, 90]]"\n')
    python.chmod(0o755)
    monkeypatch.setattr(sys, "executable", str(python))
    assert engine_memory.memory_of_visible_gpus(2) == DeviceMemory(40, 90)
    python.write_text('#!/bin/sh\necho "no driver" >&2; exit 1\n')
    with pytest.raises(RuntimeError, match="expected 2 GPUs whose free memory can be read, got: no driver"):
        memory_of_visible_gpus(2)
