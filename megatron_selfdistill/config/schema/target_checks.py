# Copyright (c) 2026 the megatron_selfdistill authors. Apache-2.0.
"""The rules that bind the target of a configuration (section target) to its other sections."""

from __future__ import annotations

from megatron_selfdistill.config.schema.field_checks import require
from megatron_selfdistill.config.schema.loss_config import LossConfig
from megatron_selfdistill.config.schema.rollout_config import RolloutConfig
from megatron_selfdistill.config.schema.target_config import TargetConfig


def check_reference(objective: str, rollout: RolloutConfig) -> None:
    """Raise `ConfigError` where other keys contradict ``target.anchor=reference``."""
    guided = rollout.guidance != "none"
    require(
        not guided or objective == "self_distillation",
        "rollout.guidance=mixed with target.anchor=reference samples from the weights of teacher and reference, "
        f"which only objective=self_distillation has, got {objective}: set rollout.guidance=none or "
        "target.anchor=student",
    )
    require(
        not guided or rollout.engine == "megatron",
        "rollout.guidance=mixed with target.anchor=reference samples from the weights of teacher and reference, "
        f"but rollout.engine={rollout.engine} has the trained weights only: set rollout.engine=megatron, "
        "rollout.guidance=none or target.anchor=student",
    )


def check_guided_tokens(objective: str, rollout: RolloutConfig, target: TargetConfig, loss: LossConfig) -> None:
    """Raise `ConfigError` where settings of guided tokens lack guidance."""
    for key, value in (
        ("target.guided_teacher_weight", target.guided_teacher_weight),
        ("loss.guided_divergence", loss.guided_divergence),
    ):
        require(
            value is None or (rollout.guidance == "mixed" and objective == "self_distillation"),
            f"{key} is for the tokens of guided problems: it needs rollout.guidance=mixed and "
            f"objective=self_distillation, got {rollout.guidance} and {objective}",
        )
