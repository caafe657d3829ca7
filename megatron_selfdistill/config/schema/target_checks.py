# Copyright (c) 2026 the megatron_selfdistill authors. Apache-2.0.
"""The rules that bind the target of a configuration (section target) to its other sections."""

from __future__ import annotations

from megatron_selfdistill.config.schema.field_checks import require
from megatron_selfdistill.config.schema.loss_config import LossConfig
from megatron_selfdistill.config.schema.rollout_config import RolloutConfig
from megatron_selfdistill.config.schema.target_config import TargetConfig


def check_reference(objective: str, rollout: RolloutConfig, target: TargetConfig, *, adapted: bool) -> None:
    """Raise `ConfigError` where other keys contradict ``target.anchor=reference``; ``adapted``: with adapters."""
    guided = rollout.guidance != "none"
    require(
        not guided or objective == "self_distillation",
        "rollout.guidance=mixed with target.anchor=reference samples from the weights of teacher and reference, "
        f"which only objective=self_distillation has, got {objective}: set rollout.guidance=none or "
        "target.anchor=student",
    )
    require(
        not guided or rollout.engine == "megatron" or adapted,
        "rollout.guidance=mixed with target.anchor=reference samples from the weights of teacher and reference, "
        f"but rollout.engine={rollout.engine} has the trained weights only: set rollout.engine=megatron, "
        "rollout.guidance=none, target.anchor=student, or adapter.rank, whose frozen weights are the reference",
    )
    require(
        not guided or rollout.engine == "megatron" or target.rule != "entropy_matched" or target.match != "student",
        "rollout.guidance=mixed with rollout.engine=vllm has two contexts per token, but target.match=student with "
        "target.anchor=reference needs those of student, teacher and reference: set target.match=reference or "
        "rollout.engine=megatron",
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
