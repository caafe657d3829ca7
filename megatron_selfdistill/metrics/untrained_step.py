# Copyright (c) 2026 the megatron_selfdistill authors. Apache-2.0.
"""The warning of a step that trains on no token, with the keys that can cause it."""

from __future__ import annotations

from collections.abc import Mapping

from megatron_selfdistill.config import Config


def warning_of_an_untrained_step(config: Config, step: int, metrics: Mapping[str, float]) -> str | None:
    """Return a warning, with the keys that can cause it, if no response token of a step has a weight in the loss."""
    without_weight = metrics.get("terms/silent_share") == 1 or metrics.get("correction/weight_mean") == 0
    if "tokens/response" in metrics and not without_weight:
        return None
    loss, rollout, data, by_rewards = config.loss, config.rollout, config.data, config.policy.weight > 0
    causes = {
        f"loss.skip_first_tokens={loss.skip_first_tokens}": loss.skip_first_tokens > 0,
        f"rollout.select={rollout.select}": rollout.select != "none",
        f"data.solutions={data.solutions}": data.hints_follow_responses or data.solutions in ("own", "skill"),
        f"data.on_long_context={data.on_long_context}": data.on_long_context == "drop",
        f"policy.reward={config.policy.reward or 'null'} (equal rewards train nothing)": by_rewards,
        f"distill.rule={config.distill.rule}": config.distill.rule != "uniform",
        f"conversations.min_log_prob={config.conversations.min_log_prob}": config.conversations.min_log_prob
        is not None,
        f"evaluation.verifier={config.evaluation.verifier}": config.objective == "rft",
    }
    keys = ", ".join(key for key, is_set in causes.items() if is_set) or "the lengths of the responses in samples.jsonl"
    return (
        f"warning: step {step} trains on nothing: expected response tokens with a weight above 0, got "
        f"{metrics.get('tokens/response', 0):g} tokens without one; look at {keys}"
    )
