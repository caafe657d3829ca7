# Copyright (c) 2026 the megatron_selfdistill authors. Apache-2.0.
"""Several batches of requests under way on servers, whose weights change meanwhile."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
from fake_server_sampler import GREEDY, sampler, tell
from fake_vllm import tokens_behind

from megatron_selfdistill.engines.vllm.server_batch import request_key
from megatron_selfdistill.errors import EngineError
from megatron_selfdistill.rollout.base import Request

HELD = 7  # the first token of the prompts whose responses the servers hold back


@pytest.fixture
def run(ranks, fakes) -> Callable[..., list[Any]]:
    """Return a function that calls another one with the addresses of both servers on ranks."""
    return lambda function, *arguments, world_size=1: ranks.run(
        function, [fake.address for fake in fakes], *arguments, world_size=world_size
    )


def requests_of(grid: Any, batch: int, count: int = 8) -> list[Request]:
    """Return this replica's requests of a batch; the servers may hold back every fourth."""
    everything = [Request([HELD if i % 4 == 3 else 1, batch, i], 100 * batch + i) for i in range(count)]
    return everything[grid.dp_rank :: grid.dp_size]


def tokens_of(requests: list[Request]) -> list[list[int]]:
    return [tokens_behind(request.prompt, 4) for request in requests]


def tell_all(addresses: list[str], grid: Any, **fault: Any) -> None:
    for address in addresses if grid.rank == 0 else []:
        tell(address, **fault)


def wait_for(ticket: Any, count: int) -> None:
    if ticket.batch is not None:
        ticket.batch.wait_for(lambda finished: len(finished) >= count or None)


def two_batches(addresses: list[str], layout: dict[str, int], settles: bool) -> Any:
    """Start two batches, send other weights while responses are held back, and collect both batches.

    Return whether the tokens are right, and the spans of each batch.
    """
    with sampler(addresses, layout, max_staleness=2) as (built, grid):
        first, second = requests_of(grid, 1), requests_of(grid, 2)
        built.update_weights(0)
        tell_all(addresses, grid, holds=[] if settles else [HELD], seconds=0.2 if settles else 0.0)
        tickets = [built.start(first, GREEDY, 1), built.start(second, GREEDY, 2)]
        if settles:
            built.settle()
        else:
            for ticket in tickets:
                wait_for(ticket, 6)
        built.update_weights(1)
        tell_all(addresses, grid, holds=[])
        responses = [built.collect(ticket) for ticket in tickets]
        right = [[one.token_ids for one in batch] for batch in responses] == [tokens_of(first), tokens_of(second)]
        metrics = built.metrics()
        assert metrics["rollout/waited_seconds"] > 0 and metrics["rollout/generation_seconds"] > 0
        return right, [[list(one.weight_spans) for one in batch] for batch in responses]


@pytest.mark.parametrize(
    ("layout", "world_size"),
    [({}, 1), ({}, 2), pytest.param({"tp": 2, "pp": 2}, 4, marks=pytest.mark.full)],
    ids=["one rank", "DP2", "TP2xPP2"],
)
def test_responses_under_way_go_on_with_new_weights(run, fakes, layout, world_size):
    for rank, (right, spans) in enumerate(run(two_batches, layout, False, world_size=world_size)):
        held = [i % 4 == 3 for i in range(8)]
        own = held[rank::2] if world_size == 2 else held
        assert right and spans == [[[(0, 1), (1, 3)] if is_held else [] for is_held in own]] * 2
    assert all("/pause" in fake.calls and fake.num_aborts == 1 for fake in fakes), "only the first update aborts"


def test_an_update_after_settling_finds_nothing_under_way(run, fakes):
    assert run(two_batches, {}, True) == [(True, [[[]] * 8] * 2)]
    assert all(fake.num_aborts == 2 for fake in fakes)


OTHER_FAULTS = [{"dead": True}, {"fail_at": "/reset_prefix_cache"}]


def server_lost(addresses: list[str], fault: dict[str, Any]) -> Any:
    with sampler(addresses, {}, max_staleness=2) as (built, grid):
        requests = requests_of(grid, 1, 16)
        built.update_weights(0)
        tell_all(addresses, grid, holds=[HELD])
        ticket = built.start(requests, GREEDY, 1)
        wait_for(ticket, 12)
        tell(addresses[0], **fault)
        built.update_weights(1)
        tell_all(addresses, grid, holds=[])
        right = [one.token_ids for one in built.collect(ticket)] == tokens_of(requests)
        return right, built.metrics()


@pytest.mark.parametrize(
    "fault",
    [{"fail_at": "/update_weights"}, *(pytest.param(fault, marks=pytest.mark.full) for fault in OTHER_FAULTS)],
    ids=str,
)
def test_a_server_lost_in_an_update_loses_no_response_that_is_under_way(run, fakes, fault):
    """The server stays paused, and nobody waits for it."""
    [(right, metrics)] = run(server_lost, fault)
    assert right and metrics["rollout/servers_alive"] == 1 and metrics["rollout/requests_retried"] >= 1
    assert sum(fakes[1].answered.values()) >= 8


def reused(addresses: list[str]) -> Any:
    """Take the finished responses of a batch, as a checkpoint does, and start the batch again with them.

    Return the number of finished responses, and whether the tokens are right, for the same requests and others.
    """
    with sampler(addresses, {}, max_staleness=1) as (built, grid):
        requests = requests_of(grid, 1)
        built.update_weights(0)
        tell_all(addresses, grid, holds=[HELD])
        ticket = built.start(requests, GREEDY, 1)
        wait_for(ticket, 6)
        finished = built.finished(ticket)
        tell_all(addresses, grid, holds=[])
        right = []
        changed = [replace(request, prompt=[*request.prompt, 3]) for request in requests]
        for asked in (requests, changed):
            again = built.collect(built.start(asked, GREEDY, 1, finished))
            right.append([one.token_ids for one in again] == tokens_of(asked))
        shorter = built.collect(built.start(requests, replace(GREEDY, max_new_tokens=2), 1, finished))
        built.update_weights(1)
        later = built.collect(built.start(requests, GREEDY, 2, finished))
        assert {one.weight_version for one in later} == {1}
        return len(finished), right, {len(one.token_ids) for one in shorter}


def test_finished_responses_are_not_generated_again_unless_something_has_changed_or_they_are_too_old(run, fakes):
    [(count, right, lengths)] = run(reused)
    assert count == 6 and right == [True, True] and lengths == {2}
    answered = fakes[0].answered + fakes[1].answered
    assert answered["[1, 1, 0]"] == 3, "once, once for a shorter response, and once for a later step"
    assert answered["[1, 1, 0, 3]"] == 1


def too_old(addresses: list[str]) -> None:
    with sampler(addresses, {}, max_staleness=1) as (built, grid):
        built.update_weights(3)
        with pytest.raises(EngineError, match="has weights of version 3"):
            built.start(requests_of(grid, 1), GREEDY, used_at=5)


def test_requests_never_begin_with_weights_that_will_be_too_old(run):
    run(too_old)


def abandoned(addresses: list[str]) -> None:
    with sampler(addresses, {}) as (built, grid):
        built.update_weights(0)
        tell_all(addresses, grid, holds=[HELD])
        wait_for(built.start(requests_of(grid, 1), GREEDY, 0), 6)


def test_a_sampler_can_be_closed_while_responses_are_under_way(run):
    run(abandoned)


def test_a_key_names_a_request_with_everything_that_its_response_depends_on():
    request = Request([1, 2], 3)
    requests = [replace(request, **change) for change in ({"prompt": [1, 3]}, {"seed": 4}, {"teacher_prompt": [1]})]
    changes = ({"max_new_tokens": 5}, {"temperature": 1.0}, {"top_k": 1}, {"stop_token_ids": (1,)})
    others = [request_key(other, GREEDY) for other in requests]
    others += [request_key(request, replace(GREEDY, **change)) for change in changes]
    assert len({request_key(request, GREEDY), *others}) == 8
    assert request_key(Request([1, 2], 3), GREEDY) == request_key(request, GREEDY)
