# Copyright (c) 2026 the megatron_selfdistill authors. Apache-2.0.
"""The sampler of a run around another one, to which it sends each version of the weights once."""

from __future__ import annotations

from collections.abc import Sequence

from megatron_selfdistill.metrics import Phases
from megatron_selfdistill.rollout.base import Request, Response, Sampler, SamplingParams


class SyncedSampler:
    """A `Sampler` around another one, which sends each version of the weights only once.

    The only state is ``version``: the version of the weights that the inner sampler has, None before the first sync.
    """

    def __init__(self, inner: Sampler, phases: Phases) -> None:
        """``phases``: where the time of a sync is counted, as phase "sync"."""
        self.inner, self._phases = inner, phases
        self.version: int | None = None

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
        self.inner.sleep()

    def metrics(self) -> dict[str, float]:
        """Return the metrics of the inner sampler since the last call."""
        return self.inner.metrics()

    def close(self) -> None:
        """End the engines and processes of the inner sampler."""
        self.inner.close()
