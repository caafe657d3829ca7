# Copyright (c) 2026 the megatron_selfdistill authors. Apache-2.0.
"""The rules that bind records and hints of a configuration (data.kind, data.solutions) to its other sections."""

from __future__ import annotations

from megatron_selfdistill.config.schema.data_config import ConversationsConfig, DataConfig
from megatron_selfdistill.config.schema.field_checks import require
from megatron_selfdistill.config.schema.loss_config import LossConfig
from megatron_selfdistill.config.schema.policy_config import DistillConfig
from megatron_selfdistill.config.schema.rollout_config import RolloutConfig


def check_conversations(
    objective: str, data: DataConfig, conversations: ConversationsConfig, rollout: RolloutConfig, loss: LossConfig
) -> None:
    """Raise `ConfigError` where other keys contradict ``data.kind=conversations``."""
    require(
        objective == "self_distillation" and data.solutions in ("given", "next_state"),
        "data.kind=conversations needs objective=self_distillation and data.solutions=given or next_state, got "
        f"{objective} and {data.solutions}",
    )
    logged = conversations.responses == "logged"
    sampled = rollout.guidance != "none" or rollout.replay or rollout.record
    require(
        not (logged and (sampled or loss.rollout_correction != "none")),
        "conversations.responses=logged samples nothing: unset rollout.guidance, rollout.replay, rollout.record "
        "and loss.rollout_correction, or set conversations.responses=sampled",
    )
    require(
        logged or conversations.min_log_prob is None,
        "conversations.min_log_prob drops unlikely logged turns: unset it, or set conversations.responses=logged",
    )


def check_hints(objective: str, data: DataConfig, rollout: RolloutConfig, logged: bool) -> None:
    """Raise `ConfigError` where other keys contradict ``data.solutions``; ``logged``: whether replies are logged."""
    require(
        data.solutions == "given" or objective != "sft",
        "objective=sft trains on the text of given solutions: leave data.solutions=given",
    )
    require(
        rollout.view == "plain" or not (data.hints_follow_responses or logged),
        f"rollout.view=privileged samples after the hint, which data.solutions={data.solutions} and logged "
        "conversations do not have: set rollout.view=plain",
    )
    require(
        not data.hints_follow_responses or rollout.guidance == "none",
        f"data.solutions={data.solutions} knows a hint only after the responses are sampled, but "
        "rollout.guidance=mixed samples with it: set rollout.guidance=none",
    )
    distils = objective == "self_distillation"
    require(
        data.solutions != "skill" or (distils and rollout.view == "plain" and rollout.guidance == "none"),
        "data.solutions=skill shows skills to the teacher alone: it needs objective=self_distillation, "
        "rollout.view=plain and rollout.guidance=none",
    )
    require(
        data.solutions != "next_state" or data.kind == "conversations",
        f"data.solutions=next_state reads the next message of a log: it needs data.kind=conversations, got {data.kind}",
    )


def check_next_state(
    conversations: ConversationsConfig, distill: DistillConfig, rollout: RolloutConfig, weighs_tokens: bool
) -> None:
    """Raise `ConfigError` where other keys contradict ``data.solutions=next_state`` with conversations.

    ``weighs_tokens``: whether a rule gives the coefficients of tokens.
    """
    accepted_rule = ConversationsConfig.accepted_rule
    require(
        conversations.responses == "logged"
        and conversations.turns == "all"
        and conversations.accepted_rule == accepted_rule,
        "data.solutions=next_state takes every logged reply that a message follows: it needs "
        "conversations.responses=logged, conversations.turns=all and no conversations.accepted_rule",
    )
    require(
        conversations.min_log_prob is None or not weighs_tokens,
        "conversations.min_log_prob weighs the divergence of logged turns alone: unset it, or leave policy.weight, "
        "distill.*, loss.normalize and loss.skip_first_tokens at their defaults",
    )
    require(
        distill.rule == "uniform" and rollout.select == "none",
        "data.solutions=next_state has one reply per turn, which cannot be compared with others: leave "
        "distill.rule=uniform and rollout.select=none",
    )
