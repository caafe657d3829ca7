# Copyright (c) 2026 the megatron_selfdistill authors. Apache-2.0.
"""Runs in one process whose responses are as old as those of servers that work ahead of the steps.

The source of the responses is that of ``rollout.ahead`` with ``rollout.at_update=wait``: the responses of step s + n
are sampled with the weights of step s.  Only the servers are missing: the trainer's own sampler generates at once what
it is asked for ahead.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import MappingProxyType
from typing import TYPE_CHECKING

from _lib.pretraining import Base
from _lib.variants import Variant
from _lib.watched_runs import Point, watch
from megatron_selfdistill.engines.vllm.server_batch import request_key
from megatron_selfdistill.overlap.ahead import AheadOnPolicy
from megatron_selfdistill.rollout.base import Request, Response, Sampler, SamplingParams
from megatron_selfdistill.sources.on_policy import OnPolicy
from megatron_selfdistill.sources.source import StepBatch

if TYPE_CHECKING:
    from megatron_selfdistill.trainer import Trainer


@dataclass(frozen=True)
class Finished:
    """The ticket of a batch, with the responses to its requests."""

    requests: Sequence[Request]
    params: SamplingParams
    responses: list[Response]


class GeneratesAtOnce:
    """The methods of a `ServerSampler` around a sampler that cannot generate while the trainer trains.

    `start` returns when all responses are finished, so that they have the weights of the last `update_weights`.
    """

    def __init__(self, inner: Sampler) -> None:
        self._inner = inner

    def start(
        self,
        requests: Sequence[Request],
        params: SamplingParams,
        used_at: int,
        known: Mapping[str, Response] = MappingProxyType({}),
    ) -> Finished:
        """Return the ticket of ``requests``, whose responses are finished; ``known`` must be empty."""
        assert not known, "the run does not resume"
        return Finished(requests, params, self._inner.generate(requests, params))

    def collect(self, ticket: Finished) -> list[Response]:
        """Return the responses of ``ticket``."""
        return ticket.responses

    def settle(self) -> None:
        """Return at once, since no responses are under way."""

    def finished(self, ticket: Finished) -> dict[str, Response]:
        """Return the responses of ``ticket``, by `request_key`."""
        keys = (request_key(request, ticket.params) for request in ticket.requests)
        return dict(zip(keys, ticket.responses, strict=True))

    def generate(self, requests: Sequence[Request], params: SamplingParams) -> list[Response]:
        """Return one response per request, as the inner sampler returns them."""
        return self._inner.generate(requests, params)

    def update_weights(self, version: int) -> None:
        """Give the inner sampler the present weights."""
        self._inner.update_weights(version)

    def sleep(self) -> None:
        """Let the inner sampler sleep."""
        self._inner.sleep()

    def metrics(self) -> dict[str, float]:
        """Return the metrics of the inner sampler."""
        return self._inner.metrics()

    def close(self) -> None:
        """Close the inner sampler."""
        self._inner.close()


class CheckedAhead(AheadOnPolicy):
    """The responses of `AheadOnPolicy`, whose measured age must be the wanted one."""

    def next_step(self, step: int, sampling: SamplingParams) -> StepBatch:
        """Return the batch of a step; the first steps have younger responses, since no weights are older.

        Raises: RuntimeError where a token has weights of another age.
        """
        batch = super().next_step(step, sampling)
        wanted = min(step, self._ahead)
        found = [batch.metrics[f"rollout/staleness_{name}"] for name in ("mean", "max")]
        if found != [wanted, wanted]:
            raise RuntimeError(f"step {step} needs responses of weights {wanted} steps old, got mean and max {found}")
        return batch


def work_ahead(trainer: Trainer, ahead: int) -> None:
    """Let a trainer that samples in process get its responses ``ahead`` steps before it trains on them.

    The configuration has rollout.max_staleness above 0, so that the age is measured.
    """
    source, sampler = trainer.source, trainer.sampler
    assert isinstance(source, OnPolicy)
    sampler.inner = GeneratesAtOnce(sampler.inner)
    steps = trainer.config.num_steps
    trainer.source = CheckedAhead(source.state, source._options, ahead, steps)


def watch_stale(
    variant: Variant, base: Base, run_dir: Path, steps: Sequence[int], *, ahead: int, num_samples: int
) -> list[Point]:
    """Train a variant on responses that are ``ahead`` steps old, and return its points as `watch` does."""

    def before_step(trainer: Trainer, step: int) -> None:
        if step == 0:
            work_ahead(trainer, ahead)

    return watch(variant, base, run_dir, steps, num_samples=num_samples, before_step=before_step)
