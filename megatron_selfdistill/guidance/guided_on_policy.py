# Copyright (c) 2026 the megatron_selfdistill authors. Apache-2.0.
"""Responses of the student of which some are sampled from the target itself."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

from megatron_selfdistill.guidance.success_rates import Guidance
from megatron_selfdistill.sources.on_policy import OnPolicy
from megatron_selfdistill.sources.source import SourceState

if TYPE_CHECKING:
    from megatron_selfdistill.data.problem_sampler import ProblemSampler
    from megatron_selfdistill.rollout.base import Request
    from megatron_selfdistill.sources.method import Method
    from megatron_selfdistill.sources.rollouts import Rollout, Sample


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

    def _first_requests(self, samples: Sequence[Sample], method: Method) -> list[Request]:
        guides, controls, requests = self._state.guidance.guides, self._options.controls, []
        for request, (key, problem, pair) in zip(super()._first_requests(samples, method), samples, strict=True):
            if guides(problem, method):
                others = () if controls is None else controls.prompts(key.step, problem)
                request = replace(request, teacher_prompt=pair.teacher_prompt, control_prompts=others)
            requests.append(request)
        return requests

    def _state_after(self, problem_sampler: ProblemSampler, method: Method, rollouts: Sequence[Rollout]) -> SourceState:
        return GuidedState(problem_sampler, method, self._state.guidance.record(rollouts))
