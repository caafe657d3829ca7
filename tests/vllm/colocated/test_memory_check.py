# Copyright (c) 2026 the megatron_selfdistill authors. Apache-2.0.
"""vLLM's own check of free memory, which only a GPU runs, with the arguments that an engine beside a trainer gets."""

from __future__ import annotations

from pathlib import Path

import pytest
import vllm
from scripts import load_script
from vllm.config import CacheConfig
from vllm.utils.mem_utils import MemorySnapshot
from vllm.v1.worker.utils import request_memory

from megatron_selfdistill.engines.vllm.colocated import _MARGIN_BYTES
from megatron_selfdistill.engines.vllm.server import serve

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


def test_every_name_that_is_used_is_there():
    names = load_script(Path(__file__).resolve().parents[3] / "tools" / "vllm_names.py")
    root = names.installed("vllm")
    assert root is not None and names.version_of(root) == vllm.__version__
    assert names.missing(root) == []


def test_a_server_finds_vllms_command_line():
    names = [function.__name__ for function in serve._command_line_of_vllm()]
    assert names == ["make_arg_parser", "validate_parsed_serve_args", "cli_env_setup"]
