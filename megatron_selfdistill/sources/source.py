# Copyright (c) 2026 the megatron_selfdistill authors. Apache-2.0.
"""The batch of a step, as one value, and the base of the sources that make batches."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor

from megatron_selfdistill.data.contexts import ContextPair
from megatron_selfdistill.data.problem_sampler import ProblemSampler
from megatron_selfdistill.data.problems import Problem
from megatron_selfdistill.pipeline.token_losses import StepOutput, TokenCoefficients
from megatron_selfdistill.rollout.base import Response, SamplingParams
from megatron_selfdistill.sources.method import Method


@dataclass(frozen=True)
class SourceState:
    """The part of a source that a checkpoint keeps.  A finished step replaces it by another one and changes nothing."""

    problem_sampler: ProblemSampler
    """The position in the data.  A source never moves this sampler, but samples from a fork."""
    method: Method
    """The method, with what earlier steps have changed, such as own solutions."""
    reached: tuple[int, ...] = field(default=(), kw_only=True)
    """The `WEIGHTS_POSITION` of each of the last steps, for rollout.horizon=auto; empty for other horizons."""


@dataclass(frozen=True)
class StepBatch:
    """Responses that are trained on together, with everything that the loss needs about their tokens.

    Everything belongs to one data-parallel replica and is the same on each of its ranks.  The tokens have the
    order of ``contexts``, whose responses follow each other; `PackedBatch.response_tokens` has the same order.
    ``problems`` and ``responses`` stay with the replica that asked for them.  ``contexts`` and all that describes them
    or their tokens may go to another replica before the step trains on them (sources/moved_contexts.py).
    A batch need not hold all responses of its step, and no stage assumes that it does: a step with several teachers is
    a sequence of batches (teachers/teacher_groups.py).
    """

    problems: Sequence[Problem] = ()
    """The problems that ``responses`` answer, each as often as the data have it in this batch."""
    responses: Sequence[Response] = ()
    """All responses, also responses without training, which the metrics of the rollout include."""
    contexts: Sequence[ContextPair] = ()
    """Both contexts of each response that is trained on."""
    solutions: Sequence[str] = ()
    """The complete solution for each of ``contexts``, even if the teacher's prompt shows only a part.  A batch that is
    made by hand may have no solutions; its responses are then not shown as samples."""
    sampler_log_probs: Tensor | None = None
    """[R_total] float64 nats, on the device: the log-probs from the sampler; infinity for tokens that were not
    sampled after the student's prompt, and None if no token was."""
    token_coefficients: TokenCoefficients | None = None
    """The coefficients of the tokens' losses; None if the loss of every token is its divergence."""
    metrics: Mapping[str, float] = field(default_factory=dict)
    """Counts from the making of the batch, over the global batch, under flat keys; equal on all ranks."""
    next_state: SourceState | None = None
    """The state of the source once this step is finished; None if the batch leaves the state as it is."""
    share: float = 1.0
    """The share of the step's responses that the batches of the step up to this one have, over all replicas."""
    ends_step: bool = True
    """Whether the step has no further batch."""
    teacher: str = ""
    """The name of the teacher of all contexts, once `by_teacher` has divided the step; "" without the key teachers."""
    next_teacher: str = ""
    """The name of the teacher of the batch after this one; after the last one the first is expected again."""

    @classmethod
    def joined(cls, batches: Sequence[StepBatch]) -> StepBatch:
        """Return all batches of a step as one batch; its metrics and its next state are those of the last one.

        The coefficients of the tokens, which belong to the tokens of one batch, are left out where there are several.
        """
        if len(batches) == 1:
            return batches[0]
        log_probs = [batch.sampler_log_probs for batch in batches if batch.sampler_log_probs is not None]
        return cls(
            problems=[problem for batch in batches for problem in batch.problems],
            responses=[response for batch in batches for response in batch.responses],
            contexts=[context for batch in batches for context in batch.contexts],
            solutions=[solution for batch in batches for solution in batch.solutions],
            sampler_log_probs=torch.cat(log_probs) if log_probs else None,
            metrics=batches[-1].metrics,
            next_state=batches[-1].next_state,
        )

    @property
    def response_lengths(self) -> list[int]:
        """The number of response tokens of each of ``contexts``."""
        return [len(context.response) for context in self.contexts]


class ResponseSource(ABC):
    """The base of the sources of responses, with a committed state that only `commit` and `load_state_dict` replace.

    Every rank of the world makes the same calls in the same order.  `next_step` is a function of the step, the weights
    and the committed state, and changes none of them: a step that is not committed is redone, bit for bit.  A source
    that works ahead of the step holds the batches that are not committed yet, and its `state_dict` stays the state
    before the first of these batches.
    """

    def __init__(self, state: SourceState) -> None:
        self._state = state

    @property
    def state(self) -> SourceState:
        """The committed state: the one before the step that is under way."""
        return self._state

    @abstractmethod
    def next_step(self, step: int, sampling: SamplingParams) -> StepBatch:
        """Return the batch of the step that ``step`` optimizer steps precede; ``sampling``: how responses are sampled.

        Raises: `EngineError` on all ranks where responses could not be sampled.
        """

    @abstractmethod
    def metrics(self, batch: StepBatch, output: StepOutput) -> dict[str, float]:
        """Return the metrics of a batch that has been through the schedule, equal on all ranks.  Collective."""

    def commit(self, batch: StepBatch) -> None:
        """Take over ``batch.next_state``: the step of this batch is finished."""
        if batch.next_state is not None:
            self._state = batch.next_state

    def state_dict(self) -> dict[str, Any]:
        """Return the committed state as plain values for a checkpoint."""
        reached = {"reached": list(self._state.reached)} if self._state.reached else {}
        return {
            "problem_sampler": self._state.problem_sampler.state_dict(),
            **reached,
            **self._state.method.state_dict(),
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Replace the committed state by the one that `state_dict` returned."""
        problem_sampler = self._state.problem_sampler.fork()
        problem_sampler.load_state_dict(state["problem_sampler"])
        method, reached = self._state.method.restored(state), tuple(state.get("reached", ()))
        self._state = replace(self._state, problem_sampler=problem_sampler, method=method, reached=reached)
