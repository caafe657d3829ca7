# Copyright (c) 2026 the megatron_selfdistill authors. Apache-2.0.
"""A sampler that gets each version of the student's weights once, however many parts of a run ask for them."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any, cast

from megatron_selfdistill.metrics import Phases
from megatron_selfdistill.rollout.base import Request, Response, Sampler, SamplingParams
from megatron_selfdistill.rollout.streaming import NO_RESPONSES, ArrivedWave, StreamingSampler, WaveRule


class SyncedSampler:
    """A `Sampler` around another one, which sends each version of the weights only once.

    The only state is ``version``: the version of the weights that the inner sampler has, None before the first sync.
    """

    def __init__(self, inner: Sampler, phases: Phases, *, settles: bool = False) -> None:
        """``phases``: where the time of a sync is counted, as phase "sync".

        ``settles``: whether new weights wait for the responses under way, for which the inner sampler streams.
        """
        self.inner, self._phases, self._settles = inner, phases, settles
        self.version: int | None = None

    def generate(self, requests: Sequence[Request], params: SamplingParams) -> list[Response]:
        """Return one response per request, with the weights of the last `update_weights`.  Collective."""
        return self.inner.generate(requests, params)

    def start(
        self,
        requests: Sequence[Request],
        params: SamplingParams,
        used_at: int,
        known: Mapping[str, Response] = NO_RESPONSES,
    ) -> Any:
        """Let an inner sampler that streams begin with ``requests``; see `StreamingSampler`.  Collective."""
        return self._streaming.start(requests, params, used_at, known)

    def stream(self, ticket: Any, rule: WaveRule) -> Iterator[ArrivedWave]:
        """Yield the responses of ``ticket`` in waves, from an inner sampler that streams.  Collective."""
        return self._streaming.stream(ticket, rule)

    def collect(self, ticket: Any) -> list[Response]:
        """Return the responses of ``ticket``, from an inner sampler that streams.  Collective."""
        return self._streaming.collect(ticket)

    def settle(self) -> None:
        """Return once an inner sampler that streams has finished all responses under way.  Collective."""
        self._streaming.settle()

    def finished(self, ticket: Any) -> dict[str, Response]:
        """Return the responses of ``ticket`` so far, by `request_key`, on rank 0; no collective."""
        return self._streaming.finished(ticket)

    def update_weights(self, version: int) -> None:
        """Send the present weights, unless the inner sampler already has the weights of ``version``.  Collective."""
        if self.version != version:
            if self._settles:
                with self._phases("rollout"):
                    self.settle()
            with self._phases("sync"):
                self.inner.update_weights(version)
            self.version = version

    @property
    def _streaming(self) -> StreamingSampler[Any]:
        return cast(StreamingSampler[Any], self.inner)

    def sleep(self) -> None:
        """Give back what only sampling needs."""
        self.inner.sleep()

    def metrics(self) -> dict[str, float]:
        """Return the metrics of the inner sampler since the last call."""
        return self.inner.metrics()

    def close(self) -> None:
        """End the engines and processes of the inner sampler."""
        self.inner.close()
