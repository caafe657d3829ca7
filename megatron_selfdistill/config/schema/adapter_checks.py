# Copyright (c) 2026 the megatron_selfdistill authors. Apache-2.0.
"""The rules that bind the adapters of a configuration (section adapter) to its other sections."""

from __future__ import annotations

from megatron_selfdistill.config.schema.adapter_config import LATENT_LAYERS, AdapterConfig
from megatron_selfdistill.config.schema.field_checks import require
from megatron_selfdistill.config.schema.rollout_config import RolloutConfig
from megatron_selfdistill.config.schema.run_config import CheckpointConfig

_MAX_ENGINE_RANK = 512  # vLLM's
_ENGINE_ARGUMENTS = ("enable_lora", "max_loras", "max_cpu_loras", "max_lora_rank", "lora_target_modules", "lora_dtype")


def check_adapters(
    adapter: AdapterConfig, rollout: RolloutConfig, checkpoint: CheckpointConfig, averages: bool
) -> None:
    """Raise `ConfigError` where other keys contradict adapters; ``averages``: whether the teacher is an average."""
    key = f"adapter.rank={adapter.rank}"
    require(
        not averages,
        f"{key} with teacher.weights=ema: the average of low-rank changes has full rank, and averages of the factors "
        "are no average of the weights: set teacher.weights=frozen or current",
    )
    require_engine(adapter, rollout)
    require(
        not checkpoint.load_optimizer,
        f"{key} with checkpoint.load_optimizer=true: the optimizer of a checkpoint belongs to all weights, but a run "
        "with adapters trains the adapters alone: set it to false",
    )
    require(
        adapter.load is None or checkpoint.load is not None,
        f"adapter.load={adapter.load} with checkpoint.load=null: these adapters belong to weights: set "
        "checkpoint.load to their base",
    )


def require_engine(adapter: AdapterConfig, rollout: RolloutConfig) -> None:
    """Raise `ConfigError` where the sampler of ``rollout`` is a vLLM that does not take ``adapter``."""
    if rollout.engine != "vllm":
        return
    key = f"adapter.rank={adapter.rank}"
    require(
        adapter.rank <= _MAX_ENGINE_RANK,
        f"{key} with rollout.engine=vllm: vLLM takes adapters up to rank {_MAX_ENGINE_RANK}: lower it, or set "
        "rollout.engine=megatron",
    )
    latent = [name for name in adapter.layers if name in LATENT_LAYERS]
    require(
        not latent,
        f"adapter.layers={adapter.layers} with rollout.engine=vllm: vLLM joins the projections of latent attention "
        f"with its kernels, without adapters: remove {', '.join(latent)}, or set rollout.engine=megatron",
    )
    own = [name for name in _ENGINE_ARGUMENTS if name in rollout.engine_args]
    require(
        not own,
        f"rollout.engine_args.{', '.join(own)} with {key}: the adapters of the run decide it: remove it",
    )
