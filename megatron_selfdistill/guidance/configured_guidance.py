# Copyright (c) 2026 the megatron_selfdistill authors. Apache-2.0.
"""Guided rollouts as a configuration wants them (rollout.guidance=mixed): their source, their sampler, their target."""

from __future__ import annotations

from dataclasses import asdict
from typing import TYPE_CHECKING

from megatron_selfdistill.config import Config
from megatron_selfdistill.evaluation.verify import check_answers
from megatron_selfdistill.guidance.guided_on_policy import GuidedOnPolicy, GuidedState
from megatron_selfdistill.guidance.guided_tokens import GuidedParams
from megatron_selfdistill.guidance.success_rates import Guidance, SuccessRates
from megatron_selfdistill.loss.target import Target
from megatron_selfdistill.rollout.base import SamplingParams
from megatron_selfdistill.sources.method import MethodTools
from megatron_selfdistill.sources.on_policy import OnPolicyOptions
from megatron_selfdistill.sources.source import SourceState

if TYPE_CHECKING:
    from megatron_selfdistill.guidance.guided_sampler import GuidedSampler


def guided_source(tools: MethodTools, state: SourceState, options: OnPolicyOptions) -> GuidedOnPolicy:
    """Return the source of guided responses; ``state``: at the beginning of the data.

    Raises: `ConfigError` if success rates decide and answers are missing.
    """
    below, judge = tools.config.rollout.guide_below, tools.judge
    if below is not None:
        check_answers(tools.run_data.problems.problems, judge.verifier)
    rates = SuccessRates(below) if below is not None else None
    guidance = Guidance(judge, options.num_samples, rates, tools.config.teachers.get("guide") or "")
    return GuidedOnPolicy(GuidedState(state.problem_sampler, state.method, guidance), options)


def guided_sampler() -> type[GuidedSampler]:
    """Return the class of the sampler, which imports Megatron."""
    from megatron_selfdistill.guidance.guided_sampler import GuidedSampler

    return GuidedSampler


def guided_params(params: SamplingParams, config: Config, batch_k: float | None, num_controls: int = 0) -> GuidedParams:
    """Return ``params`` with the target of guided requests.

    ``num_controls``: those of the run's data.  The target is `Target.configured`, with the weight of the teacher that
    guides.
    """
    target, guide = Target.configured(config.target, batch_k, num_controls), config.teachers.get("guide")
    if guide is not None and (weight := config.named_teachers[guide].weight) is not None:
        target = target.with_teacher_weight(weight)
    return GuidedParams(**asdict(params), target=target, loss_backend=config.loss.backend)
