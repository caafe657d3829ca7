# Copyright (c) 2026 the megatron_selfdistill authors. Apache-2.0.
"""A sampler that is built when the first response is wanted: a run on logs may never sample anything."""

from __future__ import annotations

from collections.abc import Callable, Sequence

from megatron_selfdistill.rollout.base import Request, Response, Sampler, SamplingParams


class OnDemandSampler:
    """A `Sampler` around another one, which the first `update_weights` or `generate` builds.

    Every rank of the world makes the same calls, so ``build`` may be a collective.  Until it is called, nothing is
    imported, allocated or started, and `sleep`, `metrics` and `close` do nothing.
    """

    def __init__(self, build: Callable[[], Sampler]) -> None:
        self._build = build
        self._sampler: Sampler | None = None

    def generate(self, requests: Sequence[Request], params: SamplingParams) -> list[Response]:
        """Return one response per request.  Collective."""
        return self._built().generate(requests, params)

    def update_weights(self, version: int) -> None:
        """Send the weights of this moment to the inner sampler.  Collective."""
        self._built().update_weights(version)

    def sleep(self) -> None:
        """Give back what only sampling needs, where the inner sampler has been built."""
        if self._sampler is not None:
            self._sampler.sleep()

    def metrics(self) -> dict[str, float]:
        """Return the metrics of the inner sampler since the last call; empty before the inner sampler is built."""
        return self._sampler.metrics() if self._sampler is not None else {}

    def close(self) -> None:
        """End the engines and processes of the inner sampler, where it has been built."""
        if self._sampler is not None:
            self._sampler.close()

    def _built(self) -> Sampler:
        if self._sampler is None:
            self._sampler = self._build()
        return self._sampler
