# Copyright (c) 2026 the megatron_selfdistill authors. Apache-2.0.
"""The sampler of a run around another one, to which it sends each version of the weights once."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import cached_property

from megatron_selfdistill.metrics.phases import Phases
from megatron_selfdistill.rollout.base import Request, Response, Sampler, SamplingParams


class SyncedSampler:
    """A `Sampler` around another one, which sends each version of the weights only once.

    The first `update_weights` or `generate` builds the inner sampler, unless somebody has read `inner` before.
    ``version``: the version of the weights that the inner sampler has, None before the first sync.
    """

    def __init__(self, build: Callable[[], Sampler], phases: Phases) -> None:
        """``build``: may be a collective.  ``phases``: where the time of a sync is counted, as phase "sync"."""
        self._build, self._phases = build, phases
        self.version: int | None = None

    @cached_property
    def inner(self) -> Sampler:
        """The inner sampler; reading it builds it."""
        return self._build()

    def generate(self, requests: Sequence[Request], params: SamplingParams) -> list[Response]:
        """Return one response per request, with the weights of the last `update_weights`.  Collective."""
        return self.inner.generate(requests, params)

    def update_weights(self, version: int) -> None:
        """Send the present weights, unless the inner sampler already has the weights of ``version``.  Collective."""
        if self.version != version:
            with self._phases("sync"):
                self.inner.update_weights(version)
            self.version = version

    def sleep(self) -> None:
        """Give back what only sampling needs."""
        if "inner" in vars(self):
            self.inner.sleep()

    def metrics(self) -> dict[str, float]:
        """Return the metrics of the inner sampler since the last call; empty before it is built."""
        return self.inner.metrics() if "inner" in vars(self) else {}

    def close(self) -> None:
        """End the engines and processes of the inner sampler, if it has been built."""
        if "inner" in vars(self):
            self.inner.close()
