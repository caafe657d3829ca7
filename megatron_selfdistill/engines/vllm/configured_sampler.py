# Copyright (c) 2026 the megatron_selfdistill authors. Apache-2.0.
"""The sampler of rollout.engine=vllm: engines beside the trainer's ranks, or servers."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import torch

from megatron_selfdistill.config import Config
from megatron_selfdistill.data.run_data import RunData
from megatron_selfdistill.distributed.ranks import RankGrid
from megatron_selfdistill.engines.vllm.engine_weights import EngineWeights
from megatron_selfdistill.engines.vllm.hf_directory import engine_directory
from megatron_selfdistill.rollout.base import Progress, Sampler


def vllm_sampler(
    config: Config, run_data: RunData, chunks: Sequence[torch.nn.Module], grid: RankGrid, progress: Progress
) -> Sampler:
    """Return the sampler of ``config.rollout``; the arguments are those of `make_sampler`.

    Collectives: every rank of the world calls it.  Raises: `ConfigError`.
    """
    rollout, run_dir = config.rollout, Path(config.run_dir)
    num_ids = run_data.num_sampled_ids  # an engine has no rows for other ids, which it would sample
    directory, rules = engine_directory(config, num_ids, run_dir, grid)
    on_servers = rollout.placement == "server"
    weights = EngineWeights(
        chunks,
        grid,
        rules,
        config.adapter,
        bucket_bytes=int(rollout.bucket_mb * 2**20),
        on_ranks=[0] if on_servers else None,
    )
    sizes = {"vocab_size": num_ids, "max_length": run_data.max_length}
    if on_servers:
        from megatron_selfdistill.engines.vllm.server_sampler import ServerSampler

        return ServerSampler(weights, grid, directory, rollout, **sizes, run_dir=run_dir, progress=progress)
    from megatron_selfdistill.engines.vllm.colocated import ColocatedSampler

    return ColocatedSampler(weights, grid, directory, rollout, **sizes, progress=progress)
