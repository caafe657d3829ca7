# Copyright (c) 2026 the megatron_selfdistill authors. Apache-2.0.
"""Build the sampler that a configuration names, and its sampling parameters."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch

from megatron_selfdistill.annexes import door
from megatron_selfdistill.config import Config
from megatron_selfdistill.config.schema.data_config import joins_turns
from megatron_selfdistill.data.run_data import RunData
from megatron_selfdistill.distributed.ranks import RankGrid
from megatron_selfdistill.errors import first_few
from megatron_selfdistill.rollout.base import Progress, Sampler, SamplingParams, ignore_progress


def make_sampler(
    config: Config,
    run_data: RunData,
    chunks: Sequence[torch.nn.Module],
    grid: RankGrid,
    progress: Progress = ignore_progress,
    in_process: Callable[..., Sampler] | None = None,
) -> Sampler:
    """Return the sampler of ``config.rollout`` for the ``chunks`` of this rank, as built or as wrapped for training.

    ``progress``: gets the number of finished responses while the sampler generates.
    ``in_process``: makes the sampler of rollout.engine=megatron in place of `MegatronSampler`, with its arguments.
    A sampler that keeps a copy of the weights has no weights yet: call `Sampler.update_weights` before the first
    response.

    Collectives: every rank of the world calls it. Raises: `ConfigError`.
    """
    rollout = config.rollout
    if rollout.engine == "megatron":
        from megatron_selfdistill.rollout.megatron.megatron_sampler import MegatronSampler

        return (in_process or MegatronSampler)(
            chunks,
            grid,
            run_data.vocab_size,
            run_data.max_length,
            rollout.kv_cache_gb,
            progress,
            continues=joins_turns(config),
            cuda_graphs=rollout.cuda_graphs,
        )
    made: Sampler = door("vllm").vllm_sampler(config, run_data, chunks, grid, progress)
    return made


def engines_of(config: Config) -> str:
    """Return the engines that sample the responses of a run, as a message names them."""
    rollout = config.rollout
    if rollout.engine == "megatron":
        return "the sampler in process (rollout.engine=megatron)"
    if rollout.placement == "colocated":
        return "the vLLM engines on the trainer's ranks"
    if rollout.servers:
        return f"the vLLM servers {first_few(rollout.servers, ', ')}"
    return f"the vLLM servers of this run, with logs in {config.run_dir}/servers,"


def sampling_params(config: Config, run_data: RunData) -> SamplingParams:
    """Return the sampling parameters of ``config.rollout``."""
    rollout = config.rollout
    return SamplingParams(
        max_new_tokens=rollout.max_new_tokens,
        temperature=rollout.temperature,
        top_k=rollout.top_k,
        top_p=rollout.top_p,
        stop_token_ids=run_data.stop_token_ids,
        num_ids=run_data.num_sampled_ids,
    )
