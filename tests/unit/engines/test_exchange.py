# Copyright (c) 2026 the megatron_selfdistill authors. Apache-2.0.
"""Requests gathered over replicas, responses returned to those that asked, errors that all ranks raise."""

from __future__ import annotations

import math

import pytest
from models import parallel

from megatron_selfdistill.distributed.ranks import initialize
from megatron_selfdistill.engines.vllm.exchange import EngineShares, check_requests, gather_requests, return_responses
from megatron_selfdistill.rollout.base import Request, Response, SamplingParams


def requests_of(replica: int, count: int) -> list[Request]:
    """Return ``count`` requests of a replica; no two requests of any replicas are equal."""
    return [Request([replica, i, *range(3 * i)], 2**64 - 1 - 10 * replica - i) for i in range(count)]


def response_to(request: Request) -> Response:
    """Return a response from which its request can be recognised."""
    length = len(request.prompt) - 2
    return Response(
        token_ids=[request.seed % 1000] * length,
        log_probs=[-math.pi] * length,
        sampled_log_probs=[math.nan] * length,
        finish_reason="stop" if length % 2 else "length",
        weight_version=12 if sum(request.prompt[:2]) % 2 else None,
    )


def own(replica: int, counts: list[int]) -> list[Request]:
    return requests_of(replica, counts[replica])


def exchanged(layout: dict[str, int], counts: list[int], engine_tp: int | None) -> tuple[list[Request], list[Response]]:
    """Return the requests that this rank, or its engine, gets to answer, and the responses that its replica got."""
    grid = initialize(parallel(**layout), seed=1)
    requests = own(grid.dp_rank, counts)
    if engine_tp is None:
        gathered = gather_requests(requests, grid)
        answered = gathered.by_replica({i: response_to(request) for i, request in enumerate(gathered.requests)})
        return list(gathered.requests), return_responses(answered, [0], grid, len(requests))
    shares = EngineShares(len(requests), grid, engine_tp)
    share = shares.distribute(requests)
    is_asked = grid.rank % engine_tp == 0  # only the first rank of an engine
    return share, shares.collect([response_to(request) for request in share] if is_asked else [])


LAYOUTS = [
    ({}, 1, [3]),
    ({}, 1, [0]),
    ({}, 2, [5, 2]),
    ({"tp": 2}, 4, [0, 4]),
    ({"pp": 2}, 4, [7, 1]),
    ({"cp": 2}, 4, [1, 6]),
    ({}, 4, [1, 0, 0, 3]),
    pytest.param({"tp": 2, "pp": 2}, 8, [5, 2], marks=pytest.mark.full),
]


def own_responses(layout: dict[str, int], world_size: int, counts: list[int], rank: int) -> list[Response]:
    """Return the responses to the requests of a rank's replica; stages are the slowest axis of the ranks."""
    replica = rank % (world_size // layout.get("pp", 1)) // (layout.get("tp", 1) * layout.get("cp", 1))
    return [response_to(request) for request in own(replica, counts)]


@pytest.mark.parametrize(("layout", "world_size", "counts"), LAYOUTS)
def test_rank_0_gets_all_requests_and_every_replica_the_responses_to_its_own(ranks, layout, world_size, counts):
    everybody = [request for replica in range(len(counts)) for request in own(replica, counts)]
    for rank, (asked, back) in enumerate(ranks.run(exchanged, layout, counts, None, world_size=world_size)):
        assert asked == ([] if rank else everybody)
        # NaN is not equal to itself
        assert repr(back) == repr(own_responses(layout, world_size, counts, rank))


@pytest.mark.parametrize(("layout", "world_size", "counts"), LAYOUTS)
@pytest.mark.parametrize("engine_tp", [1, 2])
def test_every_engine_gets_its_share_and_every_replica_the_responses(ranks, layout, world_size, counts, engine_tp):
    engine_tp = min(engine_tp, world_size)
    everybody = [request for replica in range(len(counts)) for request in own(replica, counts)]
    num_engines = world_size // engine_tp
    cuts = [len(everybody) * engine // num_engines for engine in range(num_engines + 1)]
    for rank, (asked, back) in enumerate(ranks.run(exchanged, layout, counts, engine_tp, world_size=world_size)):
        engine = rank // engine_tp
        assert asked == everybody[cuts[engine] : cuts[engine + 1]]
        assert repr(back) == repr(own_responses(layout, world_size, counts, rank))


PARAMS = SamplingParams(max_new_tokens=10)


@pytest.mark.parametrize(
    ("request_", "why"), [(Request([], 1), "empty prompt"), (Request([1] * 21, 1), "longest prompt has 21 tokens")]
)
def test_requests_that_cannot_be_answered_are_refused_before_anybody_is_asked(request_, why):
    with pytest.raises(ValueError, match=why):
        check_requests([Request([1] * 20, 2), request_], PARAMS, 30)
    check_requests([Request([1] * 20, 2), Request([1], 3)], PARAMS, 30)
