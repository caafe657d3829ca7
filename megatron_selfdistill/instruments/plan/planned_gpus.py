# Copyright (c) 2026 the megatron_selfdistill authors. Apache-2.0.
"""The number of GPUs of a plan, which the command checks before it imports torch."""

from __future__ import annotations

from megatron_selfdistill.config import Config
from megatron_selfdistill.errors import ConfigError


def planned_gpus(config: Config) -> int:
    """Return ``cluster.num_gpus``.  Raises: `ConfigError` if the key is not set or only a launch can see the model."""
    if config.cluster.num_gpus is None:
        raise ConfigError(
            "a dry run without a launch needs cluster.num_gpus, the number of GPUs to plan for: selfdistill plan "
            "cluster.num_gpus=1 checkpoint.load=/checkpoints/qwen3-1.7b data.tokenizer=/models/Qwen3-1.7B "
            "data.path=problems.jsonl, or a recipe that sets it: selfdistill plan recipe=qwen3_8b"
        )
    if config.model.provider is not None:
        raise ConfigError(
            f"model.provider={config.model.provider} builds a model that only a launch can see: start dry_run=true "
            "under torchrun, or describe the architecture in model.*"
        )
    return config.cluster.num_gpus
