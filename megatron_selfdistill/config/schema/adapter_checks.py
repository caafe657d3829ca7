# Copyright (c) 2026 the megatron_selfdistill authors. Apache-2.0.
"""The rules that bind the adapters of a configuration (section adapter) to its other sections."""

from __future__ import annotations

from megatron_selfdistill.config.schema.field_checks import require
from megatron_selfdistill.config.schema.rollout_config import RolloutConfig
from megatron_selfdistill.config.schema.run_config import CheckpointConfig


def check_adapters(rank: int, rollout: RolloutConfig, checkpoint: CheckpointConfig, averages: bool) -> None:
    """Raise `ConfigError` where other keys contradict adapters; ``averages``: whether the teacher is an average."""
    key = f"adapter.rank={rank}"
    require(
        not averages,
        f"{key} with teacher.weights=ema: the average of low-rank changes has full rank, and averages of the factors "
        "are no average of the weights: set teacher.weights=frozen or current",
    )
    require(
        rollout.engine == "megatron",
        f"{key} with rollout.engine={rollout.engine}: only the sampler in process reads adapters: set "
        "rollout.engine=megatron",
    )
    require(
        not checkpoint.load_optimizer,
        f"{key} with checkpoint.load_optimizer=true: the optimizer of a checkpoint belongs to all weights, but a run "
        "with adapters trains the adapters alone: set it to false",
    )
