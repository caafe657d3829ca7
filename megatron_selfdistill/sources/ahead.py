# Copyright (c) 2026 the megatron_selfdistill authors. Apache-2.0.
"""Responses of the student that servers generate ahead of the step that trains on them."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, replace
from typing import Any

from megatron_selfdistill.data.problems import Problem
from megatron_selfdistill.rollout.base import Request, Response, SamplingParams
from megatron_selfdistill.rollout.streaming import NO_RESPONSES, PartialBatchRule, StreamingSampler
from megatron_selfdistill.sources.judge import reward_metrics
from megatron_selfdistill.sources.method import Method, prepared
from megatron_selfdistill.sources.on_policy import AskedProblems, OnPolicy, OnPolicyOptions
from megatron_selfdistill.sources.rollouts import Rollout, SampleKey
from megatron_selfdistill.sources.source import SourceState, StepBatch


class AheadOnPolicy(OnPolicy):
    """The responses of `OnPolicy`, where servers work on the next steps while the trainer trains on the present one.

    A step begins with its weights, lets the servers begin with the batch ``ahead`` steps later, and takes its own
    responses; the weights that generated these are at most ``ahead`` steps old.  Every response is trained on in the
    step that asked for it, however long it takes.  Nothing that is asked ahead depends on responses: `Config` refuses
    prompts that do.
    """

    def __init__(
        self, state: SourceState, options: OnPolicyOptions, sampler: StreamingSampler[Any], ahead: int, num_steps: int
    ) -> None:
        """``sampler``: that of ``options``; ``num_steps``: the steps of the run, which ask for no further batches."""
        super().__init__(state, options)
        self._sampler, self._ahead, self._num_steps = sampler, ahead, num_steps
        self._tickets: dict[int, Any] = {}  # of the present step and the steps ahead, by step
        self._asked_of: dict[int, AskedProblems] = {}  # their problems, whose prompts are built once
        self._known: Mapping[str, Response] = NO_RESPONSES  # of a checkpoint, until they have tickets

    def _ticket(self, step: int, sampling: SamplingParams) -> Any:
        """Return the ticket of the step's responses; from now on the servers also work on the steps ahead of it.

        Collective over the world.
        """
        self._sampler.update_weights(step)
        problem_sampler = self.state.problem_sampler.fork()
        for later in range(step, max(step, min(step + self._ahead, self._num_steps - 1)) + 1):
            problems = problem_sampler.next_batch()
            if later not in self._tickets:
                asked = self._asked(later, problems, self.state.method)
                requests = [self._request(key, pair, is_guided=False) for key, _, pair in asked.samples]
                self._tickets[later] = self._sampler.start(requests, sampling, later, self._known)
        self._known = NO_RESPONSES
        return self._tickets[step]

    def _asked(self, step: int, global_batch: Sequence[Problem], method: Method) -> AskedProblems:
        """Return the problems of a step on this replica, with their prompts."""
        if step not in self._asked_of:
            self._asked_of[step] = super()._asked(step, global_batch, method)
        return self._asked_of[step]

    def _responses(
        self, step: int, keys: Sequence[SampleKey], requests: Sequence[Request], sampling: SamplingParams
    ) -> list[Response]:
        """Return the responses of the step, which has asked for them now or in an earlier step."""
        ticket = self._ticket(step, sampling)
        with self._options.phases("rollout"):
            return self._sampler.collect(ticket)

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
            finished |= self._sampler.finished(ticket)
        return {**super().state_dict(), "ahead": {key: asdict(response) for key, response in finished.items()}}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Replace the committed state by the one that `state_dict` returned on rank 0."""
        super().load_state_dict(state)
        self._tickets.clear()
        self._asked_of.clear()
        self._known = {key: Response(**fields) for key, fields in state.get("ahead", {}).items()}


class StreamedOnPolicy(AheadOnPolicy):
    """The responses of `AheadOnPolicy`, in partial batches of whole groups in the order in which they arrive.

    What a step does to a response depends on its group alone here: `Config` refuses methods that look at the whole
    step, and prompts that the responses of a step change.
    """

    def __init__(
        self,
        state: SourceState,
        options: OnPolicyOptions,
        sampler: StreamingSampler[Any],
        ahead: int,
        num_steps: int,
        min_tokens: int,
    ) -> None:
        """``min_tokens``: as in `PartialBatchRule`; the other arguments are those of `AheadOnPolicy`."""
        super().__init__(state, options, sampler, ahead, num_steps)
        self._rule = PartialBatchRule(options.num_samples, min_tokens)

    def batches(self, step: int, sampling: SamplingParams) -> Iterator[StepBatch]:
        """Yield this replica's share of the next global batch of problems, partial batch by partial batch.

        Raises: `EngineError` on all ranks where responses could not be sampled.
        """
        options = self._options
        method, found = prepared(self.state.method, step, sampling, self.state.problem_sampler)
        problem_sampler = self.state.problem_sampler.fork()
        asked = self._asked(step, problem_sampler.next_batch(), method)
        partial_batches = self._sampler.stream(self._ticket(step, sampling), self._rule)
        judged: list[Rollout] = []
        trained: list[Rollout] = []
        is_last = False
        while not is_last:
            with options.phases("rollout"):
                partial_batch = next(partial_batches)
            is_last = partial_batch.is_last
            of_batch = [self._rollout(asked, index, response) for index, response in partial_batch.responses.items()]
            rollouts, _ = self._rewarded(method, of_batch)
            self._record(rollouts)
            selected, _ = method.select(step, rollouts)
            kept, _ = method.texts(rollouts, selected)
            judged, trained = [*judged, *rollouts], trained + kept
            metrics = dict(found)
            if is_last:
                metrics |= self._staleness(step, judged)
            if is_last and options.judges:
                metrics |= reward_metrics(judged, trained, options.grid)
            yield replace(
                self._batch(step, method, kept, ()),
                problems=[rollout.problem for rollout in rollouts[:: options.num_samples]],
                responses=[rollout.response for rollout in rollouts],
                metrics=metrics,
                next_state=SourceState(problem_sampler, method) if is_last else None,
                share=partial_batch.share,
                ends_step=is_last,
            )

    def next_step(self, step: int, sampling: SamplingParams) -> StepBatch:
        """Return the responses of all partial batches in one batch, without the coefficients of their tokens.

        Raises: `EngineError` on all ranks where responses could not be sampled.
        """
        return StepBatch.joined(list(self.batches(step, sampling)))
