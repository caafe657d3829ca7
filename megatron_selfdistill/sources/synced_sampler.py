# Copyright (c) 2026 the megatron_selfdistill authors. Apache-2.0.
"""A sampler that gets each version of the student's weights once, however many parts of a run ask for them."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, cast

from megatron_selfdistill.metrics import Phases
from megatron_selfdistill.rollout.base import Request, Response, Sampler, SamplingParams
from megatron_selfdistill.rollout.streaming import NO_RESPONSES, ArrivedBatch, PartialBatchRule, StreamingSampler


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

    def __init__(self, inner: Sampler, phases: Phases, *, settles: bool = False, has_engine: bool = True) -> None:
        """``phases``: where the time of a sync is counted, as phase "sync".

        ``settles``: whether new weights wait for the responses under way, for which the inner sampler streams.

        ``has_engine``: whether the inner sampler has an engine of its own, which sleeps and has metrics.
        """
        self.inner, self._phases, self._settles, self._has_engine = inner, phases, settles, has_engine
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

    def stream(self, ticket: Any, rule: PartialBatchRule) -> Iterator[ArrivedBatch]:
        """Yield the responses of ``ticket`` in partial batches, from an inner sampler that streams.  Collective."""
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
        if self._has_engine:
            self.inner.sleep()

    def metrics(self) -> dict[str, float]:
        """Return the metrics of the inner sampler since the last call."""
        return self.inner.metrics() if self._has_engine else {}

    def close(self) -> None:
        """End the engines and processes of the inner sampler."""
        self.inner.close()
