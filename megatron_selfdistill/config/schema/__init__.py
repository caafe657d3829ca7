# Copyright (c) 2026 the megatron_selfdistill authors. Apache-2.0.
"""The schema of the configuration: one frozen dataclass per section, with a default and a meaning for every key."""

from __future__ import annotations

from megatron_selfdistill.config.schema.data_config import ConversationsConfig, DataConfig, SolutionsConfig
from megatron_selfdistill.config.schema.loss_config import LossConfig
from megatron_selfdistill.config.schema.model_config import ModelConfig
from megatron_selfdistill.config.schema.optimizer_config import OptimizerConfig
from megatron_selfdistill.config.schema.parallel_config import ClusterConfig, ParallelConfig, ScheduleConfig
from megatron_selfdistill.config.schema.rollout_config import RolloutConfig
from megatron_selfdistill.config.schema.run_config import (
    CheckpointConfig,
    EvaluationConfig,
    GuardsConfig,
    MetricsConfig,
    StopConfig,
)
from megatron_selfdistill.config.schema.target_config import TargetConfig, TeacherConfig
from megatron_selfdistill.config.schema.whole_config import Config

__all__ = [
    "CheckpointConfig",
    "ClusterConfig",
    "Config",
    "ConversationsConfig",
    "DataConfig",
    "EvaluationConfig",
    "GuardsConfig",
    "LossConfig",
    "MetricsConfig",
    "ModelConfig",
    "OptimizerConfig",
    "ParallelConfig",
    "RolloutConfig",
    "ScheduleConfig",
    "SolutionsConfig",
    "StopConfig",
    "TargetConfig",
    "TeacherConfig",
]
