# Copyright (c) 2026 the megatron_selfdistill authors. Apache-2.0.
"""Ranks that find vLLM imported, which otherwise takes every rank of every call longer than its test."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
from rank_worker import PRELOADED
from ranks import RankPool

# Without those that replace functions of torch where they are imported, as the worker's module does.
VLLM_MODULES = (
    "vllm.entrypoints.llm",
    "vllm.v1.executor.uniproc_executor",
    "vllm.v1.engine.llm_engine",
    "vllm._custom_ops",
)


@pytest.fixture(scope="session")
def ranks() -> Iterator[RankPool]:
    """Return ranks with vLLM; `ranks_without_vllm` is for tests of what the import of vLLM does to a process."""
    environment = {"VLLM_LOGGING_LEVEL": "ERROR", "VLLM_NO_USAGE_STATS": "1"}
    pool = RankPool((*PRELOADED, *VLLM_MODULES), environment)
    yield pool
    pool.close()


@pytest.fixture(scope="session")
def ranks_without_vllm() -> Iterator[RankPool]:
    """Return the ranks of all other tests."""
    pool = RankPool()
    yield pool
    pool.close()
