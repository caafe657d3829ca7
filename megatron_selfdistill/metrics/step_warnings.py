# Copyright (c) 2026 the megatron_selfdistill authors. Apache-2.0.
"""What the metrics of a step warn of, besides the guards."""

from __future__ import annotations

from collections.abc import Mapping

from megatron_selfdistill.config import Config, Needs
from megatron_selfdistill.metrics.first_checks import first_step_lines, first_step_warnings, warning_of_a_silent_teacher
from megatron_selfdistill.metrics.guards import WEIGHTS_POSITION, WEIGHTS_SUM, trains_on_nothing


def step_warnings(config: Config, step: int, metrics: Mapping[str, float]) -> list[str]:
    """Return what the metrics of a step, counted from 1, warn of; the first step also shows whether a run can learn."""
    found = [warning_of_an_untrained_step(config, step, metrics), change_of_horizon(metrics)]
    if step <= 1:
        if not config.needs.reads_one_prompt:  # equal weights say the same of one prompt
            found.append(warning_of_a_silent_teacher(metrics, config.target.teacher_weight))
        found += [*first_step_warnings(config, metrics), *first_step_lines(config, metrics)]
    return [*filter(None, found)]


def change_of_horizon(metrics: Mapping[str, float]) -> str | None:
    """Return a line about rollout.horizon=auto if the next step has another horizon than this one."""
    horizon, following = metrics.get("rollout/horizon"), metrics.get("rollout/next_horizon")
    if following in (None, horizon):
        return None
    below = metrics[WEIGHTS_POSITION]
    return f"rollout.horizon=auto: {horizon:g} -> {following:g} tokens; 95 % of the weights lie on the first {below:g}"


def warning_of_an_untrained_step(config: Config, step: int, metrics: Mapping[str, float]) -> str | None:
    """Return a warning, with the keys that can cause it, if no response token of a step has a weight in the loss."""
    if trains_on_nothing(metrics):
        return (
            f"warning: step {step} changes nothing: expected weights of method.token_weights whose sum is at least 1 "
            f"token, got {metrics[WEIGHTS_SUM]:.3g}; choose other weights"
        )
    without_weight = metrics.get("terms/silent_share") == 1 or metrics.get("correction/weight_mean") == 0
    if "tokens/response" in metrics and not without_weight:
        return None
    loss, data, needs = config.loss, config.data, config.needs
    rewards = " (equal rewards train nothing)" * needs.rewards
    causes = {
        f"loss.skip_first_tokens={loss.skip_first_tokens}": loss.skip_first_tokens > 0,
        f"data.on_long_context={data.on_long_context}": data.on_long_context == "drop",
        f"method.name={config.method.name}{rewards}": needs != Needs(),
        f"evaluation.verifier={config.evaluation.verifier}": needs.rewards,
    }
    keys = ", ".join(key for key, is_set in causes.items() if is_set) or "the lengths of the responses in samples.jsonl"
    return (
        f"warning: step {step} trains on nothing: expected response tokens with a weight above 0, got "
        f"{metrics.get('tokens/response', 0):g} tokens without one; look at {keys}"
    )
