# Copyright (c) 2026 the megatron_selfdistill authors. Apache-2.0.
"""Colocated engines answer their shares of all requests, whatever the layout; the engines are stand-ins for vLLM."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import colocated
import models
import pytest

from megatron_selfdistill.engines.vllm.engine import EngineRequest
from megatron_selfdistill.rollout.base import Request, Response, SamplingParams

PARAMS = SamplingParams(max_new_tokens=6)


def response_to(request: EngineRequest) -> Response:
    """Return what the stand-in answers, which depends on the prompt and the seed alone."""
    tokens = [(sum(request.token_ids) + request.sampling["seed"] + i) % models.VOCAB_SIZE for i in range(6)]
    log_probs = [-0.25 * (1 + token) for token in tokens]
    return Response(tokens, log_probs, log_probs, "length", weight_version=3)


class StandIn:
    """An engine without a model, which keeps the requests that it got."""

    name, can_sleep = "the stand-in", False

    def __init__(self) -> None:
        self.asked: list[EngineRequest] = []

    def load(self, tensors: Any, version: int) -> None:
        assert version == 3 and sum(1 for _ in tensors)

    def generate(self, requests: Sequence[EngineRequest], report: Any) -> list[Response]:
        self.asked += requests
        return [response_to(request) for request in requests]

    def close(self) -> None:
        """Do nothing."""


def requests_of(replica: int, dp_size: int) -> list[Request]:
    """Return a replica's requests: three samples of a problem each, and one problem more on the first replica."""
    problems = range(2 + (replica == 0))
    return [Request([100 * replica + p, p], 2**63 + 10 * dp_size + i) for p in problems for i in range(3)]


def generated(layout: dict[str, int], engine_tp: int) -> Any:
    """Return the number of replicas, and the prompts that this rank's engine got; check the responses."""
    from megatron_selfdistill.engines.vllm import colocated as sampling

    model = models.model_config("gqa", num_layers=2)
    chunks, grid = models.build(model, models.parallel(**layout))
    engine = StandIn()
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sampling, "_engine_on_all_ranks", lambda *args, **kwargs: engine)
        with colocated.sampler(model, chunks, grid, engine_tp=engine_tp) as built:
            built.update_weights(3)
            own = requests_of(grid.dp_rank, grid.dp_size)
            responses = built.generate(own, PARAMS)
    assert responses == [response_to(sampling.engine_request(request, PARAMS)) for request in own]
    return grid.dp_size, [request.token_ids for request in engine.asked]


@pytest.mark.parametrize(
    ("layout", "world_size", "engine_tp"),
    [({"tp": 2}, 4, 1), ({}, 4, 2), pytest.param({"pp": 2}, 4, 2, marks=pytest.mark.full)],
)
def test_every_replica_gets_its_responses_and_every_rank_of_an_engine_its_share_alone(
    ranks, layout, world_size, engine_tp
):
    results = ranks.run(generated, layout, engine_tp, world_size=world_size)
    dp_size = results[0][0]
    everything = [request.prompt for replica in range(dp_size) for request in requests_of(replica, dp_size)]
    num_engines = world_size // engine_tp
    for rank, (_, asked) in enumerate(results):
        first, end = (len(everything) * engine // num_engines for engine in (rank // engine_tp, rank // engine_tp + 1))
        assert asked == everything[first:end]
