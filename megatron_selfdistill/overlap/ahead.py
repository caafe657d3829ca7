# Copyright (c) 2026 the megatron_selfdistill authors. Apache-2.0.
"""Responses of the student that servers generate ahead of the step that trains on them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict
from typing import TYPE_CHECKING, Any, cast

from megatron_selfdistill.data.problems import Problem
from megatron_selfdistill.rollout.base import Request, Response, SamplingParams
from megatron_selfdistill.rollout.sampling import SampleKey
from megatron_selfdistill.sources.method import Method
from megatron_selfdistill.sources.on_policy import AskedProblems, OnPolicy, OnPolicyOptions
from megatron_selfdistill.sources.source import SourceState, StepBatch
from megatron_selfdistill.sources.synced_sampler import SyncedSampler

if TYPE_CHECKING:
    from megatron_selfdistill.config import RolloutConfig
    from megatron_selfdistill.engines.vllm.server_sampler import ServerSampler


def synced_sampler(rollout: RolloutConfig) -> type[SyncedSampler]:
    """Return the class of the sampler of a run: under rollout.at_update=wait a `SettledSampler`."""
    return SettledSampler if rollout.at_update == "wait" else SyncedSampler


class SettledSampler(SyncedSampler):
    """A `SyncedSampler` in which new weights wait for the responses under way; the time counts as phase "rollout"."""

    def update_weights(self, version: int) -> None:
        """Send the present weights, unless the inner sampler already has the weights of ``version``.  Collective."""
        if self.version != version:
            with self._phases("rollout"):
                cast("ServerSampler", self.inner).settle()
        super().update_weights(version)


class AheadOnPolicy(OnPolicy):
    """The responses of `OnPolicy`, where servers work on the next steps while the trainer trains on the present one.

    A step begins with its weights, lets the servers begin with the batch ``ahead`` steps later, and takes its own
    responses; the weights that generated these are at most ``ahead`` steps old.  Every response is trained on in the
    step that asked for it, however long it takes.  Nothing that is asked ahead depends on responses: `Config` refuses
    prompts that do.
    """

    def __init__(self, state: SourceState, options: OnPolicyOptions, ahead: int, num_steps: int) -> None:
        """``options``: their sampler is a `SyncedSampler`.  ``num_steps``: the steps of the run."""
        super().__init__(state, options)
        self._engines = cast("ServerSampler", cast(SyncedSampler, options.sampler).inner)
        self._ahead, self._num_steps = ahead, num_steps
        self._tickets: dict[int, Any] = {}  # of the present step and the steps ahead, by step
        self._asked_of: dict[int, AskedProblems] = {}  # their problems, whose prompts are built once
        self._known: Mapping[str, Response] = {}  # of a checkpoint, until they have tickets

    def _ticket(self, step: int, sampling: SamplingParams) -> Any:
        """Return the ticket of the step's responses; from now on the servers also work on the steps ahead of it.

        Collective over the world.
        """
        self._options.sampler.update_weights(step)
        problem_sampler = self.state.problem_sampler.fork()
        for later in range(step, max(step, min(step + self._ahead, self._num_steps - 1)) + 1):
            problems = problem_sampler.next_batch()
            if later not in self._tickets:
                asked = self._asked(later, problems, self.state.method)
                requests = self._first_requests(asked.samples, self.state.method)
                within = sampling.up_to(self._horizon(later, sampling))
                self._tickets[later] = self._engines.start(requests, within, later, self._known)
        self._known = {}
        return self._tickets[step]

    def _asked(self, step: int, global_batch: Sequence[Problem], method: Method) -> AskedProblems:
        if step not in self._asked_of:
            self._asked_of[step] = super()._asked(step, global_batch, method)
        return self._asked_of[step]

    def _responses(
        self, step: int, keys: Sequence[SampleKey], requests: Sequence[Request], sampling: SamplingParams
    ) -> list[Response]:
        """Return the responses of the step, which has asked for them now or in an earlier step."""
        ticket = self._ticket(step, sampling)
        with self._options.phases("rollout"):
            return self._engines.collect(ticket)

    def commit(self, batch: StepBatch) -> None:
        """Take over ``batch.next_state``, and forget the responses of the step."""
        super().commit(batch)
        if self._tickets:
            step = min(self._tickets)
            del self._tickets[step], self._asked_of[step]

    def state_dict(self) -> dict[str, Any]:
        """Return the committed state and, on rank 0, the finished responses of the step under way and those ahead."""
        finished = dict(self._known)
        for ticket in self._tickets.values():
            finished |= self._engines.finished(ticket)
        return {**super().state_dict(), "ahead": {key: asdict(response) for key, response in finished.items()}}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Replace the committed state by the one that `state_dict` returned on rank 0."""
        super().load_state_dict(state)
        self._tickets.clear()
        self._asked_of.clear()
        self._known = {key: Response(**fields) for key, fields in state.get("ahead", {}).items()}
