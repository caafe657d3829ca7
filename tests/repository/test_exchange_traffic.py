# Copyright (c) 2026 the megatron_selfdistill authors. Apache-2.0.
"""What a rank sends and receives for requests and responses does not grow with the world, except on rank 0."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from types import ModuleType
from typing import Any

import pytest
from models import parallel

LAYOUT = {"tp": 2, "pp": 2}
REPLICA = 4


def traffic_of(
    tools: Callable[[str], ModuleType], replicas: Sequence[int], engine_tp: int | None, **sizes: int
) -> list[list[Any]]:
    """Return the traffic of each rank in worlds of ``replicas``."""
    tool = tools("exchange_traffic")
    batch = tool.Batch(**{"problems": 3, "samples": 2, "prompt": 30, "response": 100} | sizes)
    worlds = [tool.CountedWorld(parallel(**LAYOUT), REPLICA * count) for count in replicas]
    return [tool.traffic_of(world, batch, engine_tp) for world in worlds]


def replica_of(rank: int, num_ranks: int) -> int:
    return rank % (num_ranks // LAYOUT["pp"]) // LAYOUT["tp"]


def by_place(traffic: list[Any]) -> dict[int, set[tuple[int, int]]]:
    """Return the bytes and messages of the ranks at each place of their replicas, without those of replica 0."""
    tp, stage = LAYOUT["tp"], len(traffic) // LAYOUT["pp"]
    places: dict[int, set[tuple[int, int]]] = {}
    for rank, one in enumerate(traffic):
        if replica_of(rank, len(traffic)):
            places.setdefault(rank // stage * tp + rank % tp, set()).add((one.num_bytes, one.num_messages))
    return places


@pytest.mark.parametrize("replicas", [32, pytest.param(256, marks=pytest.mark.full)])
def test_with_servers_no_rank_but_rank_0_sends_or_receives_more_in_a_larger_world(tools, replicas):
    small, large = traffic_of(tools, [2, replicas], None, response=1000)
    assert by_place(small) == by_place(large) and all(len(found) == 1 for found in by_place(large).values())
    first, last = (next(iter(by_place(large)[place])) for place in (0, REPLICA - 1))
    assert last[0] < first[0], "the first rank of a replica sends and receives for the others"
    assert last[0] == pytest.approx(21 * 6 * 1000, rel=0.1), "3 bytes of an id and twice 9 of a log-prob, each once"


@pytest.mark.parametrize(("engine_tp", "replicas"), [(1, 32), (4, 32), pytest.param(4, 256, marks=pytest.mark.full)])
def test_beside_the_trainer_a_rank_handles_16_bytes_more_for_each_further_replica(tools, engine_tp, replicas):
    small, large = traffic_of(tools, [8, replicas], engine_tp)

    def most(traffic: list[Any]) -> tuple[int, int]:
        return max(one.num_bytes for one in traffic), max(one.num_messages for one in traffic)

    assert most(large) == (most(small)[0] + (replicas - 8) * 16, most(small)[1]), (
        "the number of its requests, sent and received"
    )


def test_a_rank_gets_the_replies_of_its_own_replica_and_a_count_of_every_other_rank(tools):
    tool = tools("exchange_traffic")
    worlds = [tool.CountedWorld(parallel(**LAYOUT), REPLICA * count) for count in (2, 32)]
    small, large = (tool.traffic_of_sessions(world, num_sessions=6, length=5000) for world in worlds)
    added = max(one.num_bytes for one in large) - max(one.num_bytes for one in small)
    assert 0 < added / (REPLICA * 30) < 50 and min(one.num_bytes for one in small) > 6 * 5000
