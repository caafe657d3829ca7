# Copyright (c) 2026 the megatron_selfdistill authors. Apache-2.0.
"""Requests gathered over replicas, responses returned to those that asked, errors that all ranks raise."""

from __future__ import annotations

import math

import pytest
from models import parallel

from megatron_selfdistill.distributed.ranks import initialize
from megatron_selfdistill.engines.vllm.exchange import EngineShares, gather_requests, return_responses
from megatron_selfdistill.rollout.base import Request, Response


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
    ({}, 1, [0]),
    ({"tp": 2}, 4, [0, 4]),
    ({"pp": 2}, 4, [7, 1]),
    pytest.param({"cp": 2}, 4, [1, 6], marks=pytest.mark.full),
    ({}, 4, [1, 0, 0, 3]),
    pytest.param({"tp": 2, "pp": 2}, 8, [5, 2], marks=pytest.mark.full),
]


def own_responses(layout: dict[str, int], world_size: int, counts: list[int], rank: int) -> list[Response]:
    """Return the responses to the requests of a rank's replica; stages are the slowest axis of the ranks."""
    replica = rank % (world_size // layout.get("pp", 1)) // (layout.get("tp", 1) * layout.get("cp", 1))
    return [response_to(request) for request in own(replica, counts)]


@pytest.mark.parametrize(("layout", "world_size", "counts"), LAYOUTS)
@pytest.mark.parametrize("engine_tp", [None, 1, 2])
def test_rank_0_or_each_engine_gets_its_share_and_every_replica_the_responses_to_its_own(
    ranks, layout, world_size, counts, engine_tp
):
    everybody = [request for replica in range(len(counts)) for request in own(replica, counts)]
    size = world_size if engine_tp is None else min(engine_tp, world_size)
    cuts = [len(everybody) * engine // (world_size // size) for engine in range(world_size // size + 1)]
    arguments = (layout, counts, None if engine_tp is None else size)
    for rank, (asked, back) in enumerate(ranks.run(exchanged, *arguments, world_size=world_size)):
        share = everybody[cuts[rank // size] : cuts[rank // size + 1]]
        assert asked == ([] if engine_tp is None and rank else share)
        assert repr(back) == repr(own_responses(layout, world_size, counts, rank)), "NaN is not equal to itself"
