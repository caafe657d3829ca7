# Copyright (c) 2026 the megatron_selfdistill authors. Apache-2.0.
"""The rules that bind rewards by models to other keys: who reads a response, and after which prompt."""

from __future__ import annotations

from typing import TYPE_CHECKING

from megatron_selfdistill.config.schema.field_checks import require

if TYPE_CHECKING:
    from megatron_selfdistill.config.schema.whole_config import Config


def check_one_prompt(config: Config) -> None:
    """Raise ValueError where distill.teacher_prompt=same cannot be."""
    if not config.reads_one_prompt:
        return
    weights, rule, solutions = config.teacher.weights, config.distill.rule, config.data.solutions
    is_known = not config.data.hints_follow_responses and solutions != "skill"
    require(
        weights != "current" and rule == "uniform" and is_known and config.rollout.guidance == "none",
        "distill.teacher_prompt=same compares the student with other weights after the prompt of the samples: it "
        "needs teacher.weights=frozen or ema, distill.rule=uniform, rollout.guidance=none and no hints of "
        f"data.solutions other than given, answer and own, got {weights}, {rule}, {config.rollout.guidance} and "
        f"{solutions}",
    )
    require(
        not config.logged,
        "distill.teacher_prompt=same is for sampled responses, but conversations.responses=logged samples nothing",
    )


def check_explanations(config: Config) -> None:
    """Raise ValueError where policy.reward=explanation cannot be."""
    if config.policy.reward != "explanation":
        return
    needed = {
        "objective": (config.objective, ("self_distillation",)),
        "rollout.view": (config.rollout.view, ("privileged",)),
        "rollout.select": (config.rollout.select, ("none",)),
        "distill.teacher_prompt": (config.distill.teacher_prompt, ("same",)),
        "teacher.weights": (config.teacher.weights, ("frozen",)),
        "data.solutions": (config.data.solutions, ("given", "answer")),
        "environment.name": (config.environment.name, ("none",)),
    }
    for key, (value, allowed) in needed.items():
        require(
            value in allowed,
            "policy.reward=explanation rewards what the policy writes after the solution, as the frozen weights "
            f"read it: it needs {key}={' or '.join(allowed)}, got {value}",
        )
    require(config.policy.weight > 0, "policy.reward=explanation trains on rewards: it needs policy.weight above 0")


def check_verbal_scores(config: Config) -> None:
    """Raise ValueError where the teacher cannot give scores to responses, or a selection cannot follow them."""
    if not config.scores_responses:
        return
    selects = config.rollout.select == "verbal"
    name = "rollout.select=verbal" if selects else "policy.reward=verbal"
    needed = {
        "rollout.view": (config.rollout.view, ("plain",)),
        "rollout.guidance": (config.rollout.guidance, ("none",)),
        "data.solutions": (config.data.solutions, ("given", "answer")),
        "environment.name": (config.environment.name, ("none",)),
    }
    for key, (value, allowed) in needed.items():
        require(
            value in allowed,
            f"{name} shows the teacher a response to a problem and the solution, and asks for a score: it needs "
            f"{key}={' or '.join(allowed)}, got {value}",
        )
    require(config.policy.weight > 0, f"{name} is for rewards: it needs policy.weight above 0")
    require(
        not selects or config.policy.reward != "verbal",
        "rollout.select=verbal compares the scores with verdicts that do not come from them, but policy.reward=verbal "
        "makes the scores the verdicts: unset one of them",
    )
