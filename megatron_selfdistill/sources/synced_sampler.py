# Copyright (c) 2026 the megatron_selfdistill authors. Apache-2.0.
"""Samplers around another one: one sends each version of the weights once, one is built when it is needed."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, cast

from megatron_selfdistill.metrics.phases import Phases
from megatron_selfdistill.rollout.background import BackgroundSampler
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


class SyncedSampler:
    """A `Sampler` around another one, which sends each version of the weights only once.

    The only state is ``version``: the version of the weights that the inner sampler has, None before the first sync.
    """

    def __init__(self, inner: Sampler, phases: Phases, *, settles: bool = False) -> None:
        """``phases``: where the time of a sync is counted, as phase "sync".

        ``settles``: whether new weights wait for the responses under way of an inner `BackgroundSampler`.
        """
        self.inner, self._phases, self._settles = inner, phases, settles
        self.version: int | None = None

    def generate(self, requests: Sequence[Request], params: SamplingParams) -> list[Response]:
        """Return one response per request, with the weights of the last `update_weights`.  Collective."""
        return self.inner.generate(requests, params)

    def update_weights(self, version: int) -> None:
        """Send the present weights, unless the inner sampler already has the weights of ``version``.  Collective."""
        if self.version != version:
            if self._settles:
                with self._phases("rollout"):
                    self.background.settle()
            with self._phases("sync"):
                self.inner.update_weights(version)
            self.version = version

    @property
    def background(self) -> BackgroundSampler[Any]:
        """The inner sampler, if its engines generate while the trainer does something else."""
        return cast(BackgroundSampler[Any], self.inner)

    def sleep(self) -> None:
        """Give back what only sampling needs."""
        self.inner.sleep()

    def metrics(self) -> dict[str, float]:
        """Return the metrics of the inner sampler since the last call."""
        return self.inner.metrics()

    def close(self) -> None:
        """End the engines and processes of the inner sampler."""
        self.inner.close()
