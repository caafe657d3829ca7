# Copyright (c) 2026 the megatron_selfdistill authors. Apache-2.0.
"""The whole configuration: frozen dataclasses are the schema; hydra's YAML and the command line override it.

``load(argv)`` composes ``configs/train.yaml`` with overrides and returns a ``Config``; an unknown key, a wrong type or
an impossible value raises `ConfigError` on every rank before anything expensive starts.
"""

from __future__ import annotations

from megatron_selfdistill.config.compose import GivenKeys, from_mapping, load, to_yaml
from megatron_selfdistill.config.functions import function_named, user_code
from megatron_selfdistill.config.key_list import keys
from megatron_selfdistill.config.methods import method_class
from megatron_selfdistill.config.schema.data_config import DataConfig
from megatron_selfdistill.config.schema.method_config import MethodSettings, Needs
from megatron_selfdistill.config.schema.model_config import ModelConfig, YarnConfig
from megatron_selfdistill.config.schema.rollout_config import RolloutConfig
from megatron_selfdistill.config.schema.run_config import CheckpointConfig
from megatron_selfdistill.config.schema.step_config import (
    OptimizerConfig,
    OptimizerConstants,
    ParallelConfig,
    RecomputeConfig,
    ScheduleConfig,
)
from megatron_selfdistill.config.schema.target_config import TargetConfig
from megatron_selfdistill.config.schema.whole_config import Config
from megatron_selfdistill.errors import ConfigError

__all__ = [
    "CheckpointConfig",
    "Config",
    "ConfigError",
    "DataConfig",
    "GivenKeys",
    "MethodSettings",
    "ModelConfig",
    "Needs",
    "OptimizerConfig",
    "OptimizerConstants",
    "ParallelConfig",
    "RecomputeConfig",
    "RolloutConfig",
    "ScheduleConfig",
    "TargetConfig",
    "YarnConfig",
    "from_mapping",
    "function_named",
    "keys",
    "load",
    "method_class",
    "to_yaml",
    "user_code",
]
