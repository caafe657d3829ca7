# Copyright (c) 2026 the megatron_selfdistill authors. Apache-2.0.
"""The whole configuration: frozen dataclasses are the schema; hydra's YAML and the command line override it.

``load(argv)`` composes ``configs/train.yaml`` with overrides and returns a ``Config``; an unknown key, a wrong type or
an impossible value raises `ConfigError` on every rank before anything expensive starts.
"""

from __future__ import annotations

from megatron_selfdistill.config.compose import GivenKeys, from_mapping, given_keys, load, to_yaml
from megatron_selfdistill.config.functions import function_named, user_code
from megatron_selfdistill.config.key_list import field_docs, groups, keys, method_keys
from megatron_selfdistill.config.methods import method_class
from megatron_selfdistill.config.schema.adapter_config import AdapterConfig
from megatron_selfdistill.config.schema.data_config import ConversationsConfig, DataConfig
from megatron_selfdistill.config.schema.method_config import MethodSettings, Needs
from megatron_selfdistill.config.schema.model_config import ModelConfig, YarnConfig
from megatron_selfdistill.config.schema.rollout_config import RolloutConfig
from megatron_selfdistill.config.schema.run_config import (
    CheckpointConfig,
    EntropyGuards,
    EvaluationConfig,
    GuardsConfig,
    MetricsConfig,
)
from megatron_selfdistill.config.schema.step_config import (
    LearningRateDecay,
    OptimizerConfig,
    OptimizerConstants,
    ParallelConfig,
    RecomputeConfig,
    ScheduleConfig,
)
from megatron_selfdistill.config.schema.target_config import TargetConfig, TeacherConfig
from megatron_selfdistill.config.schema.whole_config import Config
from megatron_selfdistill.config.world_checks import check_files
from megatron_selfdistill.errors import ConfigError

__all__ = [
    "AdapterConfig",
    "CheckpointConfig",
    "Config",
    "ConfigError",
    "ConversationsConfig",
    "DataConfig",
    "EntropyGuards",
    "EvaluationConfig",
    "GivenKeys",
    "GuardsConfig",
    "LearningRateDecay",
    "MethodSettings",
    "MetricsConfig",
    "ModelConfig",
    "Needs",
    "OptimizerConfig",
    "OptimizerConstants",
    "ParallelConfig",
    "RecomputeConfig",
    "RolloutConfig",
    "ScheduleConfig",
    "TargetConfig",
    "TeacherConfig",
    "YarnConfig",
    "check_files",
    "field_docs",
    "from_mapping",
    "function_named",
    "given_keys",
    "groups",
    "keys",
    "load",
    "method_class",
    "method_keys",
    "to_yaml",
    "user_code",
]
