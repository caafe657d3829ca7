# Copyright (c) 2026 the megatron_selfdistill authors. Apache-2.0.
"""A source that takes recorded responses instead of sampling: the same tokens in every layout."""

from __future__ import annotations

from collections.abc import Sequence

from megatron_selfdistill.environments import Reply
from megatron_selfdistill.rollout.base import Request, Response, SamplingParams
from megatron_selfdistill.sources.episodes import Episode
from megatron_selfdistill.sources.on_policy import OnPolicy, OnPolicyOptions
from megatron_selfdistill.sources.recording import Recording
from megatron_selfdistill.sources.rollouts import SampleKey
from megatron_selfdistill.sources.source import SourceState


class Replay(OnPolicy):
    """Responses of another run, for the problems, samples and steps that this run would have sampled."""

    def __init__(self, state: SourceState, options: OnPolicyOptions, recording: Recording) -> None:
        super().__init__(state, options)
        self._recording = recording

    def _responses(
        self, step: int, keys: Sequence[SampleKey], requests: Sequence[Request], sampling: SamplingParams
    ) -> list[Response]:
        """Return the recorded responses of ``keys``.  Raises: ValueError for a key that was not recorded."""
        with self._options.phases("rollout"):
            return self._recording.responses(keys)

    def _replies(self, episodes: Sequence[Episode]) -> list[Reply]:
        """Return the recorded replies.  Raises: ValueError for a reply that was not recorded."""
        keys = [episode[-1].key for episode in episodes]
        return self._recording.replies([key for key in keys if key is not None])
