# Copyright (c) 2026 the megatron_selfdistill authors. Apache-2.0.
"""The protocols of what makes batches, and of what replies to the responses of a batch."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any, Protocol

from megatron_selfdistill.data.contexts import ContextPair, PromptPair
from megatron_selfdistill.data.episode_reply import Reply
from megatron_selfdistill.pipeline.token_losses import StepOutput
from megatron_selfdistill.rollout.base import Response, SamplingParams
from megatron_selfdistill.rollout.sampling import SampleKey
from megatron_selfdistill.sources.method import Method
from megatron_selfdistill.sources.rollouts import Rollout, Sample
from megatron_selfdistill.sources.source import SourceState, StepBatch

Generate = Callable[[Sequence[SampleKey], Sequence[PromptPair]], list[Response]]
"""A function that samples one response per key after its prompts.  Collective over the world."""


class EpisodePlayer(Protocol):
    """The protocol of what replies to responses, so that each becomes an episode of several turns.

    Every rank of the world makes the same calls in the same order.
    """

    def opened(self, samples: Sequence[Sample], method: Method) -> tuple[list[Sample], Sequence[Reply | None]]:
        """Return the samples with what is shown before the first responses, and the replies that show it."""
        ...

    def played(self, first: Sequence[Rollout], method: Method, generate: Generate) -> tuple[list[Rollout], int]:
        """Return all turns, episode by episode, and how many episodes end early since a prompt does not fit."""
        ...

    def name(self, key: SampleKey) -> str | None:
        """Return the name of a response's episode for the sampler, which may keep its state; None without any."""
        ...

    def with_turns(self, contexts: Sequence[ContextPair], rollouts: Sequence[Rollout]) -> list[ContextPair]:
        """Return the contexts of the rollouts with their turns."""
        ...

    def metrics(self, rollouts: Sequence[Rollout], num_cut: int) -> Mapping[str, float]:
        """Return metrics of the episodes of all replicas; ``num_cut``: the second result of `played`."""
        ...


class ResponseSource(Protocol):
    """The protocol of the sources of responses.

    Every rank of the world makes the same calls in the same order.  `next_step` is a function of the step, the weights
    and the committed state, and changes none of them: a step that is not committed is redone, bit for bit.  A source
    that works ahead of the step holds the batches that are not committed yet, and its `state_dict` stays the state
    before the first of these batches.
    """

    @property
    def state(self) -> SourceState:
        """The committed state: the one before the step that is under way."""
        ...

    def next_step(self, step: int, sampling: SamplingParams) -> StepBatch:
        """Return the batch of the step that ``step`` optimizer steps precede; ``sampling``: how responses are sampled.

        Raises: `EngineError` on all ranks where responses could not be sampled.
        """
        ...

    def metrics(self, batch: StepBatch, output: StepOutput) -> dict[str, float]:
        """Return the metrics of a batch that has been through the schedule, equal on all ranks.  Collective."""
        ...

    def commit(self, batch: StepBatch) -> None:
        """Take over ``batch.next_state``: the step of this batch is finished."""
        ...

    def state_dict(self) -> dict[str, Any]:
        """Return the committed state as plain values for a checkpoint."""
        ...

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Replace the committed state by the one that `state_dict` returned."""
        ...
