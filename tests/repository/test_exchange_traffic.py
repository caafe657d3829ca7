# Copyright (c) 2026 the megatron_selfdistill authors. Apache-2.0.
"""What a rank sends and receives for requests and responses does not grow with the world, except on rank 0."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from types import ModuleType
from typing import Any

import pytest
from models import parallel

from megatron_selfdistill.distributed.ranks import initialize

LAYOUT = {"tp": 2, "pp": 2}
REPLICA = 4
GROUPS = ("tp_group", "cp_group", "pp_group", "dp_group")


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


def test_with_servers_no_rank_but_rank_0_sends_or_receives_more_in_a_larger_world(tools):
    small, large = traffic_of(tools, [2, 32], None, response=1000)
    assert by_place(small) == by_place(large) and all(len(found) == 1 for found in by_place(large).values())
    first, last = (next(iter(by_place(large)[place])) for place in (0, REPLICA - 1))
    assert last[0] < first[0], "the first rank of a replica sends and receives for the others"
    assert last[0] == pytest.approx(8 * 6 * 1000, rel=0.1), "8 bytes per token of 6 responses, each once"


def test_with_servers_rank_0_handles_bytes_and_messages_in_proportion_to_the_replicas(tools):
    worlds = traffic_of(tools, [2, 3, 9], None, response=1000)
    two, three, nine = ((each[0].num_bytes, each[0].num_messages) for each in worlds)
    per_replica = tuple(after - before for before, after in zip(two, three, strict=True))
    assert nine == tuple(start + 7 * each for start, each in zip(two, per_replica, strict=True))
    assert per_replica[1] == 4, "a size and an array each way"
    tokens = 4 * 3 * 30 + 8 * 6 * 1000  # each prompt of a replica once, tokens and log-probs of each response
    assert tokens < per_replica[0] < 1.1 * tokens


def test_with_servers_the_bytes_of_rank_0_are_linear_in_the_tokens_of_responses(tools):
    """A token takes 8 bytes to the other replica, and 8 over each of the two groups of rank 0's own replica."""
    short, long = (traffic_of(tools, [2], None, response=length)[0][0].num_bytes for length in (100, 300))
    assert long - short == 6 * 200 * (8 + 2 * 8)


@pytest.mark.parametrize("engine_tp", [1, 4])
def test_beside_the_trainer_a_rank_handles_16_bytes_more_for_each_further_replica(tools, engine_tp):
    small, large = traffic_of(tools, [8, 32], engine_tp)

    def most(traffic: list[Any]) -> tuple[int, int]:
        return max(one.num_bytes for one in traffic), max(one.num_messages for one in traffic)

    assert most(large) == (most(small)[0] + 24 * 16, most(small)[1]), "the number of its requests, sent and received"


def groups_of_this_rank() -> list[list[int]]:
    import torch.distributed as dist

    grid = initialize(parallel(**LAYOUT), seed=1)
    return [dist.get_process_group_ranks(getattr(grid, name)) for name in GROUPS]


def test_the_ranks_that_are_counted_have_the_groups_of_megatron(tools, ranks):
    world = tools("exchange_traffic").CountedWorld(parallel(**LAYOUT), 8)
    for rank, wanted in enumerate(ranks.run(groups_of_this_rank, world_size=8)):
        grid = world.grid(rank)
        assert [list(getattr(grid, name).ranks) for name in GROUPS] == wanted


def test_a_world_that_holds_no_whole_replica_has_a_row_that_says_so(tools, capsys):
    tools("exchange_traffic").main(["--recipes", "llama31_405b", "--ranks", "8", "--response", "10"])
    assert "a replica has 128 ranks" in capsys.readouterr().out


def test_an_error_on_a_counted_rank_ends_the_world(tools):
    def fail(grid: Any) -> None:
        if grid.rank == 2:
            raise KeyError("rank 2")
        tools("exchange_traffic").gather_requests([], grid)

    with pytest.raises(KeyError, match="rank 2"):
        tools("exchange_traffic").CountedWorld(parallel(), 4).run(fail)
