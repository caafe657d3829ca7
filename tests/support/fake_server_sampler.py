# Copyright (c) 2026 the megatron_selfdistill authors. Apache-2.0.
"""A `ServerSampler` on servers of fake_vllm.py, and their faults, from any rank."""

from __future__ import annotations

import json
import tempfile
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import models

from megatron_selfdistill.adapters.low_rank_adapters import add_adapters
from megatron_selfdistill.config import RolloutConfig
from megatron_selfdistill.rollout.base import SamplingParams, ignore_progress

GREEDY = SamplingParams(max_new_tokens=4, temperature=0.0)
MODEL = models.model_config("gqa", num_layers=2)
PATIENCE_S = 3600.0


def tell(address: str, **fault: Any) -> None:
    data = json.dumps(fault).encode()
    urllib.request.urlopen(urllib.request.Request(address + "/fault", data, method="POST"), timeout=PATIENCE_S).read()


@contextmanager
def sampler(
    addresses: list[str], layout: dict[str, Any], progress=ignore_progress, adapter=None, **options: Any
) -> Iterator[tuple[Any, Any]]:
    """Yield a sampler, whose patience outlasts the test, and the grid; ``options`` are those of `RolloutConfig`."""
    from megatron_selfdistill.engines.vllm import server_pool, server_sampler, transfer_group
    from megatron_selfdistill.engines.vllm.engine_weights import EngineWeights
    from megatron_selfdistill.engines.vllm.server_sampler import ServerSampler
    from megatron_selfdistill.interop.hf.mapping import family_of_model

    server_pool.PROBE_SECONDS = server_sampler.PROBE_SECONDS = transfer_group.FORMING_SECONDS = PATIENCE_S
    chunks, grid = models.build(MODEL, models.parallel(**layout))
    if adapter is not None:
        add_adapters(chunks, adapter, grid)
    with tempfile.TemporaryDirectory() as directory:
        settings = {"transfer": "shared_memory", "transfer_dir": directory, "timeout_s": PATIENCE_S, **options}
        rules = family_of_model(MODEL).rules(MODEL)
        weights = EngineWeights(chunks, grid, rules, adapter, bucket_bytes=20_000, on_ranks=[0])
        rollout = RolloutConfig(engine="vllm", placement="server", servers=addresses, **settings)
        own = {"vocab_size": models.VOCAB_SIZE, "max_length": 64, "run_dir": Path(directory), "progress": progress}
        built = ServerSampler(weights, grid, Path(directory), rollout, **own)
        try:
            yield built, grid
        finally:
            built.close()
