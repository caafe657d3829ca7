# Copyright (c) 2026 the megatron_selfdistill authors. Apache-2.0.
"""Responses of the student of which some are sampled from the target itself."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

import torch

from megatron_selfdistill.guidance.success_rates import Guidance
from megatron_selfdistill.metrics.step import over_all_ranks
from megatron_selfdistill.sources.on_policy import OnPolicy
from megatron_selfdistill.sources.source import SourceState

if TYPE_CHECKING:
    from megatron_selfdistill.data.problem_sampler import ProblemSampler
    from megatron_selfdistill.distributed.ranks import RankGrid
    from megatron_selfdistill.rollout.base import Request, Response, SamplingParams
    from megatron_selfdistill.sources.method import Method
    from megatron_selfdistill.sources.rollouts import Rollout, Sample
    from megatron_selfdistill.sources.source import StepBatch


@dataclass(frozen=True)
class GuidedState(SourceState):
    """The state of a source whose responses may be guided."""

    guidance: Guidance
    """The choice of the problems whose responses are guided, with the success rates so far."""


class GuidedOnPolicy(OnPolicy):
    """The responses of `OnPolicy`, of which those to guided problems are sampled from the target."""

    _state: GuidedState

    def state_dict(self) -> dict[str, Any]:
        """Return the committed state as plain values for a checkpoint."""
        return {**super().state_dict(), "success": self._state.guidance.state_dict()}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Replace the committed state by the one that `state_dict` returned."""
        super().load_state_dict(state)
        if state.get("success") is not None:
            self._state = replace(self._state, guidance=self._state.guidance.restored(state["success"]))

    def next_step(self, step: int, sampling: SamplingParams) -> StepBatch:
        """Return the batch of `OnPolicy`, whose metrics also have `guided_metrics`."""
        batch = super().next_step(step, sampling)
        return replace(batch, metrics={**batch.metrics, **guided_metrics(batch.responses, self._options.grid)})

    def _first_requests(self, samples: Sequence[Sample], method: Method) -> list[Request]:
        guides, controls, requests = self._state.guidance.guides, self._options.controls, []
        for request, (key, problem, pair) in zip(super()._first_requests(samples, method), samples, strict=True):
            if guides(problem, method):
                others = () if controls is None else controls.prompts(key.step, problem)
                request = replace(request, teacher_prompt=pair.teacher_prompt, control_prompts=others)
            requests.append(request)
        return requests

    def _state_after(self, problem_sampler: ProblemSampler, method: Method, rollouts: Sequence[Rollout]) -> SourceState:
        guidance = self._state.guidance.record(rollouts)
        return replace(self._state, problem_sampler=problem_sampler, method=method, guidance=guidance)


def guided_metrics(responses: Sequence[Response], grid: RankGrid) -> dict[str, float]:
    """Return the share of guided responses in the global batch, and their mean log q - log p; no keys without any.

    ``responses``: those of this replica, the same on each of its ranks.  Collectives as in `over_all_ranks`.
    """
    sums = torch.zeros(4, dtype=torch.float64, device=grid.device)
    if grid.is_first_of_replica:
        guided = [response for response in responses if response.teacher_log_probs is not None]
        ratios = [q - p for r in guided for q, p in zip(r.sampled_log_probs, r.log_probs, strict=True)]
        numbers = [len(responses), len(guided), len(ratios), sum(ratios)]
        sums += torch.tensor(numbers, dtype=torch.float64, device=grid.device)
    (count, num_guided, num_tokens, log_ratio), _ = over_all_ranks(sums, sums[:0], grid)
    return {"guided/share": num_guided / count, "guided/log_ratio": log_ratio / num_tokens} if num_guided else {}
