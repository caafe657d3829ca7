# Copyright (c) 2026 the megatron_selfdistill authors. Apache-2.0.
"""Finished responses become partial batches of whole groups, while servers generate the others."""

from __future__ import annotations

import threading
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import pytest
from fake_server_sampler import GREEDY, sampler, tell
from fake_vllm import FakeVllm, fake_servers, tokens_behind
from hypothesis import given
from hypothesis import strategies as st

from megatron_selfdistill.errors import EngineError
from megatron_selfdistill.rollout.base import Request, Response
from megatron_selfdistill.rollout.streaming import Arrivals, BusyTime, PartialBatchRule, next_partial_batch

TIMEOUT = 120.0


def requests_of(count: int) -> list[Request]:
    """Return requests whose prompts have two tokens; the first one is the number of the request."""
    return [Request([i, 1], i) for i in range(count)]


def responses_to(indices: Any, length: int = 3) -> dict[int, Response]:
    return {i: Response.unsampled([i] * length) for i in indices}


def test_a_partial_batch_has_whole_groups_and_each_response_once():
    rule, requests = PartialBatchRule(group_size=2, min_tokens=1), requests_of(6)
    assert next_partial_batch(requests, [range(6)], responses_to([0, 2, 5]), set(), rule) is None
    assert next_partial_batch(requests, [range(6)], responses_to([0, 1, 2, 5]), set(), rule) == [0, 1]
    assert next_partial_batch(requests, [range(6)], responses_to([0, 1, 2, 5]), {0, 1}, rule) is None
    assert next_partial_batch(requests, [range(6)], responses_to(range(6)), {0, 1}, rule) == [2, 3, 4, 5]


def test_a_partial_batch_waits_until_each_replica_that_still_waits_has_enough_tokens():
    requests, replicas = requests_of(8), [range(4), range(4, 8)]
    rule = PartialBatchRule(group_size=1, min_tokens=10)  # two responses of 2 + 3 tokens
    assert next_partial_batch(requests, replicas, responses_to([0, 1, 4]), set(), rule) is None
    assert next_partial_batch(requests, replicas, responses_to([0, 1, 4, 5]), set(), rule) == [0, 1, 4, 5]
    # The first replica has all its responses, however few are new.
    finished = responses_to([0, 1, 2, 3, 4, 5])
    assert next_partial_batch(requests, replicas, finished, {0, 1, 2}, rule) == [3, 4, 5]
    # The last partial batch has what is left.
    assert next_partial_batch(requests, replicas, responses_to(range(8)), set(range(7)), rule) == [7]
    assert next_partial_batch([], [], {}, set(), rule) == []


@given(st.data())
def test_all_responses_come_once_whatever_order_they_arrive_in(data):
    group_size = data.draw(st.integers(1, 3))
    groups = data.draw(st.lists(st.integers(0, 4), min_size=1, max_size=3))
    ends = [group_size * sum(groups[: i + 1]) for i in range(len(groups))]
    replicas = [range(end - group_size * count, end) for end, count in zip(ends, groups, strict=True)]
    order = data.draw(st.permutations(range(ends[-1])))
    rule = PartialBatchRule(group_size, data.draw(st.integers(0, 40)))
    returned: list[int] = []
    for count in range(len(order) + 1):
        partial_batch = next_partial_batch(
            requests_of(ends[-1]), replicas, responses_to(order[:count]), set(returned), rule
        )
        if partial_batch is not None:
            returned += partial_batch
    assert sorted(returned) == list(range(ends[-1])) == sorted(set(returned))


def test_arrivals_wait_for_enough_and_count_the_time_on_both_sides():
    go_on, waited = threading.Event(), threading.Event()

    def work(arrived: Any) -> None:
        arrived(responses_to([0]))
        assert go_on.wait(60)
        arrived(responses_to([1]))
        assert waited.wait(60)  # the work ends after the wait

    busy_time, waiting_time = BusyTime(), BusyTime()
    arrivals = Arrivals(work, {5: Response.unsampled([5])}, busy_time)
    assert arrivals.wait_for(lambda finished: sorted(finished) if 0 in finished else None) == [0, 5]
    later = threading.Timer(0.2, go_on.set)

    def all_of_them(finished: Mapping[int, Response]) -> int | None:
        if later.ident is None:
            later.start()  # the work cannot end before the wait has lasted this long
        return len(finished) if len(finished) == 3 else None

    with waiting_time:
        assert arrivals.wait_for(all_of_them) == 3
    waited.set()
    arrivals.join()
    assert 0.1 < waiting_time.take() <= busy_time.take()
    assert sorted(arrivals.so_far()) == [0, 1, 5]
    assert arrivals.of([1])[1].token_ids == [1, 1, 1]


def test_an_error_of_the_work_is_raised_where_a_partial_batch_is_wanted():
    def work(arrived: Any) -> None:
        arrived(responses_to([0]))
        raise EngineError("the last server is gone")

    arrivals = Arrivals(work, {}, BusyTime())
    for call in (lambda: arrivals.wait_for(lambda finished: None), arrivals.join):
        with pytest.raises(EngineError, match="the last server is gone"):
            call()


@pytest.fixture
def fakes() -> Iterator[list[FakeVllm]]:
    with fake_servers(2) as servers:
        yield servers


def own_requests(grid: Any, count: int) -> list[Request]:
    """Return this replica's requests: groups of two, whose prompts begin with the number of the group."""
    groups = [[Request([group, i], 10 * group + i) for i in range(2)] for group in range(count)]
    return [request for group in groups[grid.dp_rank :: grid.dp_size] for request in group]


@contextmanager
def held(addresses: list[str], groups: list[int], grid: Any) -> Iterator[Any]:
    """Let the servers hold back the responses to ``groups`` until the value, a function, is called on rank 0."""

    def tell_all(**fault: Any) -> None:
        for address in addresses if grid.rank == 0 else []:
            tell(address, **fault)

    tell_all(holds=groups)
    yield lambda: tell_all(holds=[])


def streamed(addresses: list[str], layout: dict[str, int], fault: dict[str, Any]) -> Any:
    """Stream 6 groups, of which the servers hold back two until the first partial batch has come.

    Return the tokens of this replica by request, the shares of the partial batches, the metrics, and whether a second
    step without partial batches gives the same tokens; or the message of an error.
    """
    with sampler(addresses, layout) as (built, grid):
        requests = own_requests(grid, 6)
        built.update_weights(0)
        with held(addresses, [2, 5], grid) as release:
            found, shares = {}, []
            try:
                for partial_batch in built.stream(
                    built.start(requests, GREEDY, 0), PartialBatchRule(group_size=2, min_tokens=1)
                ):
                    assert not set(found) & set(partial_batch.responses)
                    found |= {i: response.token_ids for i, response in partial_batch.responses.items()}
                    shares.append((partial_batch.share, partial_batch.is_last))
                    if len(shares) == 1 and fault and grid.rank == 0:
                        tell(addresses[0], **fault)
                    release()
            except EngineError as error:
                return str(error)
        metrics = built.metrics()
        again = [response.token_ids for response in built.generate(requests, GREEDY)]
        return [found[i] for i in range(len(requests))], shares, metrics, again


@pytest.mark.timing
@pytest.mark.parametrize(
    ("layout", "world_size"),
    [pytest.param({}, 1, marks=pytest.mark.full), ({}, 2), pytest.param({"tp": 2, "pp": 2}, 4, marks=pytest.mark.full)],
    ids=["one rank", "DP2", "TP2xPP2"],
)
def test_partial_batches_come_while_servers_generate_and_have_the_responses_of_a_whole_batch(
    ranks, fakes, layout, world_size
):
    addresses = [fake.address for fake in fakes]
    per_rank = ranks.run(streamed, addresses, layout, {}, world_size=world_size, timeout=TIMEOUT)
    assert len({str(shares) for _, shares, _, _ in per_rank}) == 1, "all ranks take the same partial batches"
    for rank, (tokens, shares, metrics, again) in enumerate(per_rank):
        groups = range(6)[rank % 2 :: 2] if layout == {} and world_size == 2 else range(6)
        assert tokens == again == [tokens_behind([group, i], 4) for group in groups for i in range(2)]
        assert len(shares) >= 2 and shares[-1] == (1.0, True) and all(not last for _, last in shares[:-1])
        assert [share for share, _ in shares] == sorted(share for share, _ in shares)
        assert shares[0][0] <= 8 / 12, "two groups are held back"
        assert metrics["rollout/partial_batches"] == len(shares)
        assert 0 <= metrics["rollout/waited_seconds"] <= metrics["rollout/generation_seconds"]


def test_a_server_that_dies_between_partial_batches_loses_and_repeats_no_response(ranks, fakes):
    fakes[0].seconds = 0.05
    [(tokens, shares, metrics, _)] = ranks.run(
        streamed, [fake.address for fake in fakes], {}, {"dead": True}, world_size=1, timeout=TIMEOUT
    )
    assert tokens == [tokens_behind([group, i], 4) for group in range(6) for i in range(2)]
    assert shares[-1] == (1.0, True) and metrics["rollout/servers_alive"] == 1


def test_the_death_of_all_servers_between_partial_batches_is_one_message_on_every_rank(ranks, fakes):
    messages = ranks.run(streamed, [fakes[0].address], {}, {"dead": True}, world_size=2, timeout=TIMEOUT)
    assert len(set(messages)) == 1 and "no vLLM server is left" in messages[0]


def abandoned(addresses: list[str]) -> float:
    """Take the first partial batch and no other, then close the sampler; return the seconds that this takes."""
    with sampler(addresses, {}) as (built, grid):
        built.update_weights(0)
        with held(addresses, [2, 5], grid):
            ticket = built.start(own_requests(grid, 6), GREEDY, 0)
            next(built.stream(ticket, PartialBatchRule(group_size=2, min_tokens=1)))
            began = time.monotonic()
            built.close()
            return time.monotonic() - began


@pytest.mark.timing
def test_a_sampler_can_be_closed_between_partial_batches(ranks, fakes):
    [seconds] = ranks.run(abandoned, [fake.address for fake in fakes], world_size=1, timeout=TIMEOUT)
    assert seconds < 30
