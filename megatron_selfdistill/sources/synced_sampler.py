# Copyright (c) 2026 the megatron_selfdistill authors. Apache-2.0.
"""The sampler of a run around another one, to which it sends each version of the weights once."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, cast

from megatron_selfdistill.metrics import Phases
from megatron_selfdistill.rollout.background import BackgroundSampler
from megatron_selfdistill.rollout.base import Request, Response, Sampler, SamplingParams


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
