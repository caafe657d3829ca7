# Copyright (c) 2026 the megatron_selfdistill authors. Apache-2.0.
"""The protocol of what replies to responses, so that each becomes an episode."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Protocol

from megatron_selfdistill.data.contexts import ContextPair, PromptPair
from megatron_selfdistill.data.episode_reply import Reply
from megatron_selfdistill.rollout.base import Response
from megatron_selfdistill.rollout.sampling import SampleKey
from megatron_selfdistill.sources.method import Method
from megatron_selfdistill.sources.rollouts import Rollout, Sample

Generate = Callable[[Sequence[SampleKey], Sequence[PromptPair]], list[Response]]
"""A function that samples one response per key after its prompts.  Collective over the world."""


class EpisodePlayer(Protocol):
    """The protocol of what replies to responses, so that each becomes an episode of several turns.

    Every rank of the world makes the same calls in the same order.
    """

    def opened(self, samples: Sequence[Sample], method: Method) -> tuple[list[Sample], Sequence[Reply | None]]:
        """Return the samples with what is shown before the first responses, and the replies that show it."""

    def played(self, first: Sequence[Rollout], method: Method, generate: Generate) -> tuple[list[Rollout], int]:
        """Return all turns, episode by episode, and how many episodes end early since a prompt does not fit."""

    def name(self, key: SampleKey) -> str | None:
        """Return the name of a response's episode for the sampler, which may keep its state; None without any."""

    def with_turns(self, contexts: Sequence[ContextPair], rollouts: Sequence[Rollout]) -> list[ContextPair]:
        """Return the contexts of the rollouts with their turns."""

    def metrics(self, rollouts: Sequence[Rollout], num_cut: int) -> Mapping[str, float]:
        """Return metrics of the episodes of all replicas; ``num_cut``: the second result of `played`."""
