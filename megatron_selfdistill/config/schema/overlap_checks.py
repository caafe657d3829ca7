# Copyright (c) 2026 the megatron_selfdistill authors. Apache-2.0.
"""The rules that bind ``rollout.overlap`` to other keys: what a step may do to a response before all are there."""

from __future__ import annotations

from megatron_selfdistill.config.schema.data_config import DataConfig
from megatron_selfdistill.config.schema.environment_config import EnvironmentConfig
from megatron_selfdistill.config.schema.field_checks import require
from megatron_selfdistill.config.schema.loss_config import LossConfig
from megatron_selfdistill.config.schema.policy_config import PolicyConfig
from megatron_selfdistill.config.schema.rollout_config import RolloutConfig


def check_overlap(
    data: DataConfig,
    rollout: RolloutConfig,
    environment: EnvironmentConfig,
    loss: LossConfig,
    policy: PolicyConfig,
    *,
    samples_responses: bool,
) -> None:
    """Raise ValueError where a step cannot train on a part of its responses while others are missing.

    ``samples_responses``: whether the objective samples the responses that it trains on.
    """
    require(
        rollout.overlap == "stream" or rollout.wave_microbatches is None,
        "rollout.wave_microbatches is the size of a wave: it needs rollout.overlap=stream, or null",
    )
    if rollout.overlap == "none":
        return
    require(
        samples_responses and rollout.replay is None,
        "rollout.overlap=stream trains on responses while others are being sampled, but this run samples none: set "
        "rollout.overlap=none",
    )
    require(
        rollout.engine == "vllm" and rollout.placement == "server",
        "rollout.overlap=stream trains while servers generate, and an engine on the trainer's own devices cannot "
        f"generate meanwhile: it needs rollout.engine=vllm and rollout.placement=server, got {rollout.engine} and "
        f"{rollout.placement}",
    )
    follows = data.hints_follow_responses or data.solutions in ("own", "skill", "next_state")
    whole_step = {
        f"data.solutions={data.solutions}": (follows, "changes the prompts of a step with the responses of the step"),
        f"environment.name={environment.name}": (environment.exists, "plays episodes turn by turn, all at once"),
        f"rollout.select={rollout.select}": (rollout.select != "none", "selects among the responses of a step"),
        f"rollout.guidance={rollout.guidance}": (
            rollout.guidance != "none",
            "gives each server its responses at once, so that none arrives before the others",
        ),
        f"loss.normalize={loss.normalize}": (
            loss.normalize != "tokens",
            "divides by the number of responses or problems of a step",
        ),
        f"policy.reward={policy.reward}": (
            policy.reward in ("explanation", "verbal"),
            "lets the models read the responses of a step",
        ),
    }
    for key, (is_set, why) in whole_step.items():
        require(not is_set, f"{key} {why}, which are not all there under rollout.overlap=stream: set one of them back")
