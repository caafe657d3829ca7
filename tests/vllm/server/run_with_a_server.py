# Copyright (c) 2026 the megatron_selfdistill authors. Apache-2.0.
"""A trainer that starts a server of its own, tells what it wrote, and waits to be killed."""

from __future__ import annotations

import os
import sys
import time
from pathlib import Path

import models
from trained import FAMILY, GREEDY, MAX_LENGTH, MODEL, requests

from megatron_selfdistill.config import RolloutConfig
from megatron_selfdistill.engines.vllm.engine_weights import EngineWeights
from megatron_selfdistill.engines.vllm.server_sampler import ServerSampler


def main(run_dir: Path, hf_config: Path) -> None:
    chunks, grid = models.build(MODEL, models.parallel())
    own = {"engine": "vllm", "placement": "server", "num_servers": 1, "kv_cache_gb": 0.1, "timeout_s": 600.0}
    engine_args = {"max_num_seqs": 8, "enable_prefix_caching": False}
    sampler = ServerSampler(
        EngineWeights(chunks, grid, FAMILY.rules(MODEL), bucket_bytes=2**20, on_ranks=[0]),
        grid,
        hf_config,
        RolloutConfig(**own, server_python=os.environ["SELFDISTILL_VLLM_PYTHON"], engine_args=engine_args),
        vocab_size=models.VOCAB_SIZE,
        max_length=MAX_LENGTH,
        run_dir=run_dir,
    )
    sampler.update_weights(0)
    [response] = sampler.generate(requests(12)[:1], GREEDY)
    print("server", sampler._started[0].process.pid)
    print("tokens", response.token_ids, flush=True)
    time.sleep(600)


if __name__ == "__main__":
    main(Path(sys.argv[1]), Path(sys.argv[2]))
