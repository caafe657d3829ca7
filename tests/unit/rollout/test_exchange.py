# Copyright (c) 2026 the megatron_selfdistill authors. Apache-2.0.
"""Requests gathered over replicas, responses returned to those that asked, errors that all ranks raise."""

from __future__ import annotations

import math
import re
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
from models import parallel

from megatron_selfdistill.distributed.ranks import initialize
from megatron_selfdistill.engines.vllm.exchange import (
    EngineShares,
    check_requests,
    gather_requests,
    return_responses,
)
from megatron_selfdistill.errors import EngineError
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


def rounded(response: Response) -> Response:
    """Return ``response`` with log-probs as they travel: numbers of float32."""
    values = {name: getattr(response, name) for name in ("log_probs", "sampled_log_probs")}
    return replace(response, **{name: np.array(x, np.float32).tolist() for name, x in values.items()})


def answer_by_rank_0(requests: list[Request], grid: Any, fault: str) -> tuple[list[Request], dict[int, Response]]:
    """Return the requests that rank 0 gets, and the responses of this replica."""
    gathered = gather_requests(requests, grid)
    responses = {i: response_to(request) for i, request in enumerate(gathered.requests)}
    if fault == "missing" and grid.rank == 0:
        del responses[1]
    answered = gathered.by_replica(responses)
    if fault == "unwanted" and grid.rank == 0:
        answered[0][len(answered[0])] = response_to(gathered.requests[0])
    return list(gathered.requests), return_responses(answered, [0], grid, range(len(requests)))


def answer_by_engines(
    requests: list[Request], grid: Any, fault: str, engine_tp: int
) -> tuple[list[Request], dict[int, Response]]:
    """Return the requests that this rank's engine gets, and the responses of this replica."""
    shares = EngineShares(len(requests), grid, engine_tp)
    share = shares.distribute(requests)
    responses = [response_to(request) for request in share]
    if fault == "missing" and grid.rank == 0:
        responses.pop()
    if grid.rank % engine_tp:
        responses = []  # only the first rank of an engine is asked
    return share, dict(enumerate(shares.collect(responses)))


def exchanged(
    layout: dict[str, int], counts: list[int], engine_tp: int | None, fault: str = ""
) -> tuple[list[Request], list[Response] | str]:
    """Return the requests that this rank gets to answer, and the responses that its replica got, or the error."""
    grid = initialize(parallel(**layout), seed=1)
    requests = own(grid.dp_rank, counts)
    try:
        if engine_tp is None:
            asked, found = answer_by_rank_0(requests, grid, fault)
        else:
            asked, found = answer_by_engines(requests, grid, fault, engine_tp)
    except EngineError as error:
        return [], str(error)
    return asked, [found[i] for i in range(len(requests))]


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
    return [rounded(response_to(request)) for request in own(replica, counts)]


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


@pytest.mark.parametrize(
    ("engine_tp", "fault", "found"),
    [
        (None, "missing", "rank 0: expected one .* but request 1 waits and has 0"),
        (None, "unwanted", "rank 0: .* but request 3 does not wait and has 1"),
        (1, "missing", "rank 0: .* but request 2 waits and has 0"),
    ],
)
def test_a_missing_or_unwanted_response_is_an_error_on_all_ranks(ranks, engine_tp, fault, found):
    sentences = [back for _, back in ranks.run(exchanged, {}, [3, 3], engine_tp, fault, world_size=2)]
    assert sentences[0] == sentences[1] and re.search(found, sentences[0])


def test_a_request_that_is_no_request_is_an_error_on_all_ranks(ranks):
    first, second = ranks.run(impossible, world_size=2)
    assert first == second and "rank 1: OverflowError" in first


def impossible() -> str:
    grid = initialize(parallel(), seed=1)
    with pytest.raises(EngineError) as error:
        gather_requests([Request([2**40 * grid.rank + 1], 1)], grid)
    return str(error.value)


PARAMS = SamplingParams(max_new_tokens=10)


@pytest.mark.parametrize(
    ("request_", "why"),
    [
        (Request([], 1), "empty prompt"),
        (Request([1] * 21, 1), "longest prompt has 21 tokens"),
        (Request([1], 1, [2]), "guided rollouts are sampled in process, not by vLLM"),
    ],
)
def test_requests_that_cannot_be_answered_are_refused_before_anybody_is_asked(request_, why):
    with pytest.raises(ValueError, match=why):
        check_requests([Request([1] * 20, 2), request_], PARAMS, 30)
    check_requests([Request([1] * 20, 2), Request([1], 3)], PARAMS, 30)
