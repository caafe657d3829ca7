# Copyright (c) 2026 the megatron_selfdistill authors. Apache-2.0.
"""vLLM's own check of free memory, which only a GPU runs, with the arguments that an engine beside a trainer gets."""

from __future__ import annotations

import inspect

import pytest
from vllm.config import CacheConfig
from vllm.utils.mem_utils import MemorySnapshot
from vllm.v1.worker import gpu_worker
from vllm.v1.worker.utils import request_memory

from megatron_selfdistill.engines.vllm.colocated import _beside_trainer
from megatron_selfdistill.engines.vllm.engine_memory import MARGIN_BYTES, DeviceMemory

GIB = 2**30
ARGUMENTS = {"kv_cache_memory_bytes": 16 * GIB}
WEIGHT_BYTES = 15.3 * GIB


def snapshot(free: float, total: float) -> MemorySnapshot:
    """Return the snapshot of a GPU of this size, as vLLM's worker takes it when its process groups exist."""
    return MemorySnapshot(free_memory=int(free), total_memory=int(total), device="cpu", auto_measure=False)


@pytest.mark.parametrize(("free", "total"), [(58.7 * GIB, 80 * GIB), (119.3 * GIB, 139.8 * GIB)])
@pytest.mark.parametrize("taken", [0, MARGIN_BYTES])
def test_vllm_starts_beside_a_trainer_of_an_8b_model(free, total, taken):
    with pytest.raises(ValueError, match="less than desired GPU memory utilization"):
        request_memory(snapshot(free, total), CacheConfig(**ARGUMENTS))
    arguments = _beside_trainer(ARGUMENTS, DeviceMemory(int(free), int(total)), WEIGHT_BYTES)
    assert request_memory(snapshot(free - taken, total), CacheConfig(**arguments)) <= free - taken


def test_vllm_checks_free_memory_where_a_worker_starts_and_nowhere_else():
    """Waking up would fail beside a trainer that has grown since."""
    assert inspect.getsource(gpu_worker).count("request_memory(") == 1
    assert "request_memory(" in inspect.getsource(gpu_worker.Worker.init_device)
    assert "get_memory_info" not in inspect.getsource(gpu_worker.Worker.wake_up)
