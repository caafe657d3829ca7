# Copyright (c) 2026 the megatron_selfdistill authors. Apache-2.0.
"""Build the sampler that a configuration names, and its sampling parameters."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial

import torch

from megatron_selfdistill.annexes import door
from megatron_selfdistill.config import Config
from megatron_selfdistill.data.run_data import RunData
from megatron_selfdistill.distributed.ranks import RankGrid
from megatron_selfdistill.errors import first_few
from megatron_selfdistill.rollout.base import Progress, RoleWeights, Sampler, SamplingParams, ignore_progress


def make_sampler(
    config: Config,
    run_data: RunData,
    chunks: Sequence[torch.nn.Module],
    grid: RankGrid,
    role_weights: Sequence[RoleWeights] = (),
    progress: Progress = ignore_progress,
) -> Sampler:
    """Return the sampler of ``config.rollout`` for the ``chunks`` of this rank, as built or as wrapped for training.

    ``role_weights``: the weights of teacher and reference, with which the sampler in process samples from the target.
    ``progress``: gets the number of finished responses while the sampler generates.
    A sampler that keeps a copy of the weights has no weights yet: call `Sampler.update_weights` before the first
    response.

    Collectives: every rank of the world calls it. Raises: `ConfigError`.
    """
    rollout = config.rollout
    if rollout.engine == "megatron":
        from megatron_selfdistill.rollout.megatron.megatron_sampler import MegatronSampler

        make: Callable[..., Sampler] = MegatronSampler
        if rollout.samples_target:
            make = partial(door("guidance").guided_sampler(), role_weights=role_weights)
        return make(
            chunks,
            grid,
            run_data.vocab_size,
            run_data.max_length,
            rollout.kv_cache_gb,
            progress,
            continues=config.joins_turns,
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


def sampling_params(config: Config, run_data: RunData, batch_k: float | None = None) -> SamplingParams:
    """Return the sampling parameters of ``config.rollout``; ``batch_k``: the k of a step under target.rule=batch."""
    rollout = config.rollout
    params = SamplingParams(
        max_new_tokens=rollout.max_new_tokens,
        temperature=rollout.temperature,
        top_k=rollout.top_k,
        top_p=rollout.top_p,
        stop_token_ids=run_data.stop_token_ids,
        num_ids=run_data.num_sampled_ids,
    )
    if not rollout.samples_target:
        return params
    guided: SamplingParams = door("guidance").guided_params(params, config, batch_k, run_data.num_controls)
    return guided
