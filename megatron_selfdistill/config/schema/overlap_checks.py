# Copyright (c) 2026 the megatron_selfdistill authors. Apache-2.0.
"""The rules for steps that begin without all of their responses: rollout.overlap, ahead and extra_problems."""

from __future__ import annotations

from collections.abc import Mapping

from megatron_selfdistill.config.schema.data_config import DataConfig, EnvironmentConfig
from megatron_selfdistill.config.schema.field_checks import require
from megatron_selfdistill.config.schema.method_config import GIVEN, Needs
from megatron_selfdistill.config.schema.rollout_config import RolloutConfig
from megatron_selfdistill.config.schema.target_config import LossConfig


def check_overlap(
    method: str,
    needs: Needs,
    data: DataConfig,
    rollout: RolloutConfig,
    environment: EnvironmentConfig,
    loss: LossConfig,
    *,
    samples_responses: bool,
) -> None:
    """Raise ValueError where a step needs responses that are not there, while servers still generate them.

    ``method``: the name of the method.  ``samples_responses``: whether it samples the responses that it trains on.
    """
    streams = rollout.overlap == "stream"
    require(
        streams or rollout.partial_batch_microbatches is None,
        "rollout.partial_batch_microbatches is the size of a partial batch: it needs rollout.overlap=stream, or null",
    )
    require(
        rollout.ahead > 0 or rollout.at_update == "wait",
        "rollout.at_update=keep is about responses that servers generate ahead: it needs rollout.ahead of at least 1",
    )
    require(
        rollout.extra_problems > 0 or rollout.round_tokens is None,
        "rollout.round_tokens is the length of a round of partial responses: it needs rollout.extra_problems, or null",
    )
    needs_all = _needing_all_responses(method, needs, rollout, environment)
    if rollout.extra_problems:
        _check_partial(data, rollout, needs_all, samples_responses=samples_responses)
    mode = "rollout.overlap=stream" if streams else f"rollout.ahead={rollout.ahead}"
    if not streams and not rollout.ahead:
        return
    require(
        samples_responses and rollout.replay is None,
        f"{mode} trains on responses while others are being sampled, but this run samples none: set "
        "rollout.overlap=none and rollout.ahead=0",
    )
    require(
        rollout.engine == "vllm" and rollout.placement == "server",
        f"{mode} trains while servers generate, and an engine on the trainer's own devices cannot generate meanwhile: "
        f"it needs rollout.engine=vllm and rollout.placement=server, got {rollout.engine} and {rollout.placement}",
    )
    if streams:
        needs_all |= {
            f"method.name={method}": (needs.whole_step or needs.hint != GIVEN, "looks at all responses of a step"),
            f"loss.normalize={loss.normalize}": (
                loss.normalize != "tokens",
                "divides by the number of responses or problems of a step",
            ),
        }
    for key, (is_set, why) in needs_all.items():
        require(not is_set, f"{key} {why}, which are not all there under {mode}: set one of them back")
    if rollout.ahead:
        _check_ahead(rollout)


def _check_ahead(rollout: RolloutConfig) -> None:
    require(
        rollout.max_staleness >= rollout.ahead,
        f"rollout.ahead={rollout.ahead} trains on responses of weights that are up to {rollout.ahead} steps old: it "
        f"needs rollout.max_staleness of at least {rollout.ahead}, got {rollout.max_staleness}",
    )
    require(
        rollout.overlap == "none" or rollout.at_update == "keep",
        "rollout.at_update=wait has all responses of a step before the step begins, so that none can stream: set "
        "rollout.at_update=keep or rollout.overlap=none",
    )


def _check_partial(
    data: DataConfig, rollout: RolloutConfig, needs_all: Mapping[str, tuple[bool, str]], *, samples_responses: bool
) -> None:
    mode = f"rollout.extra_problems={rollout.extra_problems}"
    require(
        samples_responses and rollout.replay is None,
        f"{mode} lets a step train on the responses that are finished first, but this run samples none: set it to 0",
    )
    require(
        rollout.placement == "colocated" and rollout.overlap == "none" and not rollout.ahead,
        f"{mode} is for an engine on the trainer's own devices: set rollout.placement=colocated, or use "
        "rollout.ahead=1 and rollout.at_update=keep with servers",
    )
    for key, (is_set, _) in needs_all.items():
        require(
            not is_set, f"{key} needs all responses of a step, some of which go on under {mode}: set one of both back"
        )
    require(
        rollout.extra_problems <= rollout.max_staleness * data.global_batch_size,
        f"{mode} lets responses take more steps than rollout.max_staleness={rollout.max_staleness} allows with "
        f"data.global_batch_size={data.global_batch_size}: it needs rollout.max_staleness of at least "
        f"{-(-rollout.extra_problems // data.global_batch_size)}",
    )
    require(
        rollout.max_new_tokens % rollout.tokens_per_round == 0,
        f"rollout.round_tokens must divide rollout.max_new_tokens={rollout.max_new_tokens}, got {rollout.round_tokens}",
    )


def _needing_all_responses(
    method: str, needs: Needs, rollout: RolloutConfig, environment: EnvironmentConfig
) -> dict[str, tuple[bool, str]]:
    """Return whether each key needs all responses of a step at once, and why."""
    return {
        f"method.name={method}": (needs.hint != GIVEN, "changes the prompts of a step with responses"),
        f"environment.name={environment.name}": (environment.exists, "plays episodes turn by turn, all at once"),
        f"rollout.guidance={rollout.guidance}": (
            rollout.guidance != "none",
            "gives each server its responses at once and needs one version of the weights for each",
        ),
    }
