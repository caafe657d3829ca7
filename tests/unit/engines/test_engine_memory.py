# Copyright (c) 2026 the megatron_selfdistill authors. Apache-2.0.
"""The share of a GPU for an engine beside a trainer, and the shares that are refused."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from megatron_selfdistill.config import RolloutConfig
from megatron_selfdistill.engines.vllm import colocated

GIB = 2**30


def test_the_share_is_what_is_free_less_the_margin(monkeypatch):
    monkeypatch.setattr(torch.cuda, "empty_cache", lambda: None)
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda: (59 * GIB, 80 * GIB))
    monkeypatch.setattr(colocated, "min_over_ranks", lambda numbers: numbers)
    assert colocated._free_share() == 57 / 80


@pytest.mark.parametrize(("engine_args", "share"), [({}, None), ({"gpu_memory_utilization": 0.5}, 0.5)])
def test_a_colocated_engine_takes_what_the_trainer_leaves_unless_the_user_sets_its_share(
    monkeypatch, engine_args, share
):
    recorded: dict[str, Any] = {}
    monkeypatch.setattr(colocated, "_free_share", lambda: 0.7)
    monkeypatch.setattr(colocated, "_engine_on_all_ranks", lambda *args, settings, **options: recorded.update(settings))
    grid: Any = SimpleNamespace(device=torch.device("cuda"), world_size=1, rank=0)
    weights: Any = SimpleNamespace(transformer=SimpleNamespace(params_dtype=torch.bfloat16), adapter=None)
    rollout = RolloutConfig(engine="vllm", kv_cache_gb=16.0, engine_args=engine_args)
    colocated.ColocatedSampler(weights, grid, Path("model"), rollout, vocab_size=100, max_length=64)
    assert recorded["gpu_memory_utilization"] == (share or 0.7)
    assert recorded["kv_cache_memory_bytes"] == 16 * GIB
