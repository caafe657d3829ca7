# Copyright (c) 2026 the megatron_selfdistill authors. Apache-2.0.
"""The rules that bind rewards by models to other keys: who reads a response, and after which prompt."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from megatron_selfdistill.config.schema.data_config import DataConfig
from megatron_selfdistill.config.schema.environment_config import EnvironmentConfig
from megatron_selfdistill.config.schema.field_checks import require
from megatron_selfdistill.config.schema.policy_config import DistillConfig, PolicyConfig
from megatron_selfdistill.config.schema.rollout_config import RolloutConfig
from megatron_selfdistill.config.schema.target_config import TeacherConfig


def check_readers(
    objective: str,
    data: DataConfig,
    rollout: RolloutConfig,
    distill: DistillConfig,
    policy: PolicyConfig,
    teacher: TeacherConfig,
    environment: EnvironmentConfig,
    *,
    logged: bool,
) -> None:
    """Raise ValueError where models cannot read responses as the configuration says.

    ``logged``: whether the responses are those of a log.
    """
    if objective == "self_distillation" and distill.teacher_prompt == "same":
        _check_one_prompt(data, rollout, distill, teacher, logged)
    if policy.reward == "explanation":
        _check_explanations(objective, data, rollout, distill, policy, teacher, environment)
    if "verbal" in (policy.reward, rollout.select):
        _check_verbal_scores(data, rollout, policy, environment)


def _check_one_prompt(
    data: DataConfig, rollout: RolloutConfig, distill: DistillConfig, teacher: TeacherConfig, logged: bool
) -> None:
    weights, rule, solutions = teacher.weights, distill.rule, data.solutions
    is_known = not data.hints_follow_responses and solutions != "skill"
    require(
        weights != "current" and rule == "uniform" and is_known and rollout.guidance == "none",
        "distill.teacher_prompt=same compares the student with other weights after the prompt of the samples: it "
        "needs teacher.weights=frozen or ema, distill.rule=uniform, rollout.guidance=none and no hints of "
        f"data.solutions other than given, answer and own, got {weights}, {rule}, {rollout.guidance} and "
        f"{solutions}",
    )
    require(
        not logged,
        "distill.teacher_prompt=same is for sampled responses, but conversations.responses=logged samples nothing",
    )


def _check_explanations(
    objective: str,
    data: DataConfig,
    rollout: RolloutConfig,
    distill: DistillConfig,
    policy: PolicyConfig,
    teacher: TeacherConfig,
    environment: EnvironmentConfig,
) -> None:
    needed = {
        "objective": (objective, ("self_distillation",)),
        "rollout.view": (rollout.view, ("privileged",)),
        "rollout.select": (rollout.select, ("none",)),
        "distill.teacher_prompt": (distill.teacher_prompt, ("same",)),
        "teacher.weights": (teacher.weights, ("frozen",)),
        "data.solutions": (data.solutions, ("given", "answer")),
        "environment.name": (environment.name, ("none",)),
    }
    _require_choices(
        needed,
        "policy.reward=explanation rewards what the policy writes after the solution, as the frozen weights read it",
    )
    require(policy.weight > 0, "policy.reward=explanation trains on rewards: it needs policy.weight above 0")


def _check_verbal_scores(
    data: DataConfig, rollout: RolloutConfig, policy: PolicyConfig, environment: EnvironmentConfig
) -> None:
    selects = rollout.select == "verbal"
    name = "rollout.select=verbal" if selects else "policy.reward=verbal"
    needed = {
        "rollout.view": (rollout.view, ("plain",)),
        "rollout.guidance": (rollout.guidance, ("none",)),
        "data.solutions": (data.solutions, ("given", "answer")),
        "environment.name": (environment.name, ("none",)),
    }
    _require_choices(needed, f"{name} shows the teacher a response to a problem and the solution, and asks for a score")
    require(policy.weight > 0, f"{name} is for rewards: it needs policy.weight above 0")
    require(
        not selects or policy.reward != "verbal",
        "rollout.select=verbal compares the scores with verdicts that do not come from them, but policy.reward=verbal "
        "makes the scores the verdicts: unset one of them",
    )


def _require_choices(needed: Mapping[str, tuple[str, Sequence[str]]], reason: str) -> None:
    """Raise ValueError with ``reason`` for the first key whose value is none of its choices: key -> value, choices."""
    for key, (value, allowed) in needed.items():
        require(value in allowed, f"{reason}: it needs {key}={' or '.join(allowed)}, got {value}")
