# Copyright (c) 2026 the megatron_selfdistill authors. Apache-2.0.
"""The share of a GPU for an engine beside a trainer, and the shares that are refused."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from megatron_selfdistill.config import RolloutConfig
from megatron_selfdistill.engines.vllm import colocated, engine_memory, engine_weights
from megatron_selfdistill.engines.vllm.engine_memory import (
    MARGIN_BYTES,
    DeviceMemory,
    memory_of_visible_gpus,
    why_no_room,
)
from megatron_selfdistill.errors import ConfigError
from megatron_selfdistill.interop.hf.rules import MegatronSlice, rows

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


def test_weights_and_cache_that_do_not_fit_are_refused_with_the_keys_that_help():
    memory = memory_of("80 GiB")
    assert why_no_room(memory, 15.3 * GIB, 16 * GIB) is None
    refusal = why_no_room(memory, 15.3 * GIB, 42 * GIB)
    assert refusal is not None and "15.3 GiB of weights and 42.0 GiB of KV cache" in refusal
    assert "58.7 of 80.0 GiB are free" in refusal and "rollout.kv_cache_gb" in refusal
    assert why_no_room(memory, 56.8 * GIB, None) is not None
    assert why_no_room(DeviceMemory(GIB, 80 * GIB), 0, 0) is not None  # the share would not be positive


@pytest.fixture
def built(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Any:
    """Return a function that builds a colocated sampler of an 8B model and returns the engine's arguments.

    Of the GPU's memory 58.7 GiB are free.
    """
    recorded: dict[str, Any] = {}
    monkeypatch.setattr(engine_weights, "Exporter", lambda *args, **options: None)
    monkeypatch.setattr(colocated, "free_bytes", lambda: memory_of("80 GiB").free)
    monkeypatch.setattr(colocated, "_least_memory", lambda grid: memory_of("80 GiB"))
    monkeypatch.setattr(colocated, "_engine_on_all_ranks", lambda *args, settings, **options: recorded.update(settings))
    (tmp_path / "config.json").write_text(json.dumps({"vocab_size": 100, "model_type": "qwen3"}))
    module = SimpleNamespace(config=SimpleNamespace(params_dtype=torch.bfloat16))
    monkeypatch.setattr(colocated, "unwrapped", lambda chunk: module)
    grid = SimpleNamespace(device=torch.device("cuda"), world_size=1, rank=0)

    def build(**options: Any) -> dict[str, Any]:
        rules = [rows(MegatronSlice("weight"), {"weight": (2**13, 10**6)})]
        sampler = colocated.ColocatedSampler(
            [torch.nn.Identity()],
            grid,
            tmp_path,
            rules,
            RolloutConfig(engine="vllm", **options),
            vocab_size=100,
            max_length=64,
        )
        assert sampler is not None
        return recorded

    return build


def test_a_colocated_engine_takes_what_the_trainer_leaves_and_its_cache_as_set(built):
    arguments = built(kv_cache_gb=16.0)
    assert arguments["gpu_memory_utilization"] == memory_of("80 GiB").share
    assert arguments["kv_cache_memory_bytes"] == 16 * GIB


def test_a_share_that_the_user_sets_stays(built):
    assert built(kv_cache_gb=16.0, engine_args={"gpu_memory_utilization": 0.5})["gpu_memory_utilization"] == 0.5


def test_a_colocated_engine_that_does_not_fit_is_refused_before_vllm_starts(built):
    with pytest.raises(ConfigError, match=r"15\.3 GiB of weights and 45\.0 GiB of KV cache"):
        built(kv_cache_gb=45.0)


def test_gpus_are_looked_at_by_a_process_that_ends(monkeypatch, tmp_path):
    python = tmp_path / "python"
    python.write_text('#!/bin/sh\n[ "$3" = 2 ] && echo "[[50, 80], [40, 90]]"\n')
    python.chmod(0o755)
    monkeypatch.setattr(sys, "executable", str(python))
    assert engine_memory.memory_of_visible_gpus(2) == DeviceMemory(40, 90)
    python.write_text('#!/bin/sh\necho "no driver" >&2; exit 1\n')
    with pytest.raises(RuntimeError, match="expected 2 GPUs whose free memory can be read, got: no driver"):
        memory_of_visible_gpus(2)
