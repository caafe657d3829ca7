# Copyright (c) 2026 the megatron_selfdistill authors. Apache-2.0.
"""vLLM's own check of free memory, which only a GPU runs, with the arguments that an engine beside a trainer gets."""

from __future__ import annotations

import pytest
from vllm.config import CacheConfig
from vllm.utils.mem_utils import MemorySnapshot
from vllm.v1.worker.utils import request_memory

from megatron_selfdistill.engines.vllm.colocated import _MARGIN_BYTES

GIB = 2**30
ARGUMENTS = {"kv_cache_memory_bytes": 16 * GIB}


def snapshot(free: float, total: float) -> MemorySnapshot:
    """Return the snapshot of a GPU of this size, as vLLM's worker takes it when its process groups exist."""
    return MemorySnapshot(free_memory=int(free), total_memory=int(total), device="cpu", auto_measure=False)


@pytest.mark.parametrize(("free", "total"), [(58.7 * GIB, 80 * GIB), (119.3 * GIB, 139.8 * GIB)])
@pytest.mark.parametrize("taken", [0, _MARGIN_BYTES])
def test_vllm_starts_beside_a_trainer_of_an_8b_model(free, total, taken):
    with pytest.raises(ValueError, match="less than desired GPU memory utilization"):
        request_memory(snapshot(free, total), CacheConfig(**ARGUMENTS))
    arguments = ARGUMENTS | {"gpu_memory_utilization": (int(free) - _MARGIN_BYTES) / int(total)}
    assert request_memory(snapshot(free - taken, total), CacheConfig(**arguments)) <= free - taken
