# Copyright (c) 2026 the megatron_selfdistill authors. Apache-2.0.
"""A sampler that is built when something is to be sampled: a run on logs may never need one."""

from __future__ import annotations

from collections.abc import Callable, Sequence

from megatron_selfdistill.rollout.base import Request, Response, Sampler, SamplingParams


class OnDemandSampler:
    """`Sampler` around the one that ``build`` returns, which is called by the first `update_weights` or `generate`.

    Every rank of the world makes the same calls, so ``build`` may be a collective.  Until then nothing is imported,
    allocated or started, and `sleep`, `metrics` and `close` do nothing.
    """

    def __init__(self, build: Callable[[], Sampler]) -> None:
        self._build = build
        self._sampler: Sampler | None = None

    def generate(self, requests: Sequence[Request], params: SamplingParams) -> list[Response]:
        """As the sampler's."""
        return self._built().generate(requests, params)

    def update_weights(self, version: int) -> None:
        """As the sampler's."""
        self._built().update_weights(version)

    def sleep(self) -> None:
        """As the sampler's."""
        if self._sampler is not None:
            self._sampler.sleep()

    def metrics(self) -> dict[str, float]:
        """As the sampler's."""
        return self._sampler.metrics() if self._sampler is not None else {}

    def close(self) -> None:
        """As the sampler's."""
        if self._sampler is not None:
            self._sampler.close()

    def _built(self) -> Sampler:
        if self._sampler is None:
            self._sampler = self._build()
        return self._sampler
