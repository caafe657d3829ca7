# Copyright (c) 2026 the megatron_selfdistill authors. Apache-2.0.
"""Requests gathered over replicas, responses returned to those that asked, errors that all ranks raise."""

from __future__ import annotations

import math
import pickle
from typing import Any

import pytest
import torch
import torch.distributed as dist
from models import parallel

from megatron_selfdistill.distributed.ranks import initialize
from megatron_selfdistill.errors import EngineError
from megatron_selfdistill.rollout.base import Request, Response, SamplingParams
from megatron_selfdistill.rollout.vllm.exchange import (
    check_requests,
    gather_requests,
    return_responses,
)


def requests_of(replica: int, count: int) -> list[Request]:
    """Return ``count`` requests of a replica; no two requests of any replicas are equal."""
    return [
        Request(
            [replica, i, *range(3 * i)], 2**64 - 1 - 10 * replica - i, [7, i][: 3 * i] if (replica + i) % 2 else None
        )
        for i in range(count)
    ]


def response_to(request: Request) -> Response:
    """Return a response from which its request can be recognised."""
    length = len(request.prompt) - 2
    teacher = request.teacher_prompt
    return Response(
        token_ids=[request.seed % 1000] * length,
        log_probs=[-math.pi] * length,
        sampled_log_probs=[math.nan] * length,
        finish_reason="stop" if length % 2 else "length",
        teacher_log_probs=None if teacher is None else [-1 / 3] * length,
        weight_version=None if teacher is None else 12,
    )


def own(replica: int, counts: list[int]) -> list[Request]:
    return requests_of(replica, counts[replica])


def exchanged(tp: int, counts: list[int], fault: str = "") -> tuple[list[Request], list[Response] | str]:
    """Return all requests as this rank sees them, and the responses that its replica got, or the error's message.

    Rank i % world generates response i.
    """
    grid = initialize(parallel(tp=tp), seed=1)
    gathered = gather_requests(own(grid.dp_rank, counts), grid)
    generated = {i: response_to(r) for i, r in enumerate(gathered.requests) if i % grid.world_size == grid.rank}
    if fault and grid.rank == 1:
        generated = (
            {i: r for i, r in generated.items() if i != 1} if fault == "missing" else {**generated, 0: generated[1]}
        )
    try:
        return gathered.requests, return_responses(generated, gathered)
    except EngineError as error:
        return gathered.requests, str(error)


@pytest.mark.parametrize(
    ("tp", "world_size", "counts"),
    [(1, 1, [3]), (1, 1, [0]), (1, 2, [5, 2]), (2, 4, [0, 4]), (2, 4, [7, 1]), (1, 4, [1, 0, 0, 3])],
)
def test_every_replica_gets_the_responses_to_its_own_requests(ranks, tp, world_size, counts):
    everybody = [request for replica in range(len(counts)) for request in own(replica, counts)]
    for rank, (requests, back) in enumerate(ranks.run(exchanged, tp, counts, world_size=world_size)):
        assert requests == everybody
        wanted = [response_to(request) for request in own(rank // tp, counts)]
        assert repr(back) == repr(wanted)  # NaN is not equal to itself


@pytest.mark.parametrize(("fault", "found"), [("missing", "request 1 has 0"), ("twice", "request 0 has 2")])
def test_a_missing_or_doubled_response_is_an_error_on_all_ranks(ranks, fault, found):
    sentences = [back for _, back in ranks.run(exchanged, 1, [3, 3], fault, world_size=2)]
    assert sentences[0] == sentences[1] and found in sentences[0]


def collectives_of_an_exchange(counts: list[int]) -> tuple[list[str], int, int]:
    """Return the collectives in which responses return, the bytes that this rank receives, and the expected bytes.

    The expected bytes are those of the responses to the requests of this rank's replica, one share for each rank.
    """
    grid = initialize(parallel(), seed=1)
    gathered = gather_requests(own(grid.dp_rank, counts), grid)
    generated = {i: response_to(r) for i, r in enumerate(gathered.requests) if i % grid.world_size == grid.rank}
    called, received = [], []
    with pytest.MonkeyPatch.context() as patch:

        def recorded(name: str, original: Any) -> Any:
            def call(*args: Any, **kwargs: Any) -> Any:
                called.append(name)
                received.append(args[0].numel() if args[0].dtype == torch.uint8 else 0)
                return original(*args, **kwargs)

            return call

        for name in ("all_reduce", "all_gather", "broadcast", "all_to_all_single"):
            patch.setattr(dist, name, recorded(name, getattr(dist, name)))
        back = dict(zip(gathered.own, return_responses(generated, gathered), strict=True))
    shares = [[(i, vars(back[i])) for i in back if i % grid.world_size == rank] for rank in range(grid.world_size)]
    return called, sum(received), sum(len(pickle.dumps(share)) for share in shares)


def test_responses_travel_in_one_collective_to_those_who_asked_however_many_ranks_there_are(ranks):
    for called, received, wanted in ranks.run(collectives_of_an_exchange, [5, 2, 0, 3], world_size=4):
        assert called == ["all_to_all_single", "all_to_all_single", "all_reduce"]  # sizes, responses, errors
        assert received == pytest.approx(wanted, abs=100)  # a pickle stores equal strings of one process once


PARAMS = SamplingParams(max_new_tokens=10)


@pytest.mark.parametrize(
    ("request_", "guided", "why"),
    [
        (Request([], 1), True, "empty prompt"),
        (Request([1] * 21, 1), True, "longest prompt has 21 tokens"),
        (Request([1], 1, [1] * 21), True, "longest prompt has 21 tokens"),
        (Request([1], 1, []), True, "empty prompt"),
        (Request([1], 1, [2]), False, "engines were built without guided"),
    ],
)
def test_requests_that_cannot_be_answered_are_refused_before_anybody_is_asked(request_, guided, why):
    with pytest.raises(ValueError, match=why):
        check_requests([Request([1] * 20, 2), request_], PARAMS, 30, guided=guided, who="the engines")
    check_requests([Request([1] * 20, 2), Request([1], 3, [2] * 20)], PARAMS, 30, guided=True, who="the engines")
