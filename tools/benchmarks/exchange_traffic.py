# Copyright (c) 2026 the megatron_selfdistill authors. Apache-2.0.
"""Count the bytes and messages with which requests reach engines and responses return, in worlds of up to 1,024 ranks.

    python tools/benchmarks/exchange_traffic.py
    python tools/benchmarks/exchange_traffic.py --recipes llama31_405b --ranks 256 1024 --problems 8

The script runs the exchange of `engines/vllm/exchange.py` on every rank of a recipe's layout, over threads in place of
a network (counted_ranks.py).  Each replica has the same number of problems in every world, so that the responses of the
whole world are proportional to the ranks.  A row states what rank 0 sends and receives in a step, and the most that any
other rank does; the last column is the most bytes of any rank for one turn of an environment's sessions, whose replies
have 4,000 letters.
"""

from __future__ import annotations

import argparse
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from functools import partial
from types import SimpleNamespace
from typing import Any

from counted_ranks import CountedWorld, Traffic

from megatron_selfdistill.config import Config, load
from megatron_selfdistill.data.episode_reply import Reply
from megatron_selfdistill.distributed.ranks import RankGrid
from megatron_selfdistill.engines.vllm.exchange import EngineShares, gather_requests, return_responses
from megatron_selfdistill.environments.episodes import SessionEpisodes
from megatron_selfdistill.rollout.base import Request, Response
from megatron_selfdistill.rollout.sampling import SampleKey

RECIPES = ("qwen3_8b", "llama31_405b", "deepseek_v3")
RANKS = (8, 64, 512, 1024)


@dataclass(frozen=True)
class Batch:
    """The requests of each replica, and the lengths of their prompts and responses in tokens."""

    problems: int
    samples: int
    prompt: int
    response: int

    def requests(self, replica: int) -> list[Request]:
        """Return the requests of a replica: neighbouring samples have one prompt."""
        return [
            Request([replica, problem, *range(self.prompt - 2)], 2**63 + sample)
            for problem in range(self.problems)
            for sample in range(self.samples)
        ]

    def responses(self, count: int) -> list[Response]:
        """Return responses, which are equal but share no list."""
        log_probs = [-0.5 * (i % 7) for i in range(self.response)]
        tokens = range(1000, 1000 + self.response)
        return [
            Response(list(tokens), list(log_probs), list(log_probs), "stop", weight_version=1) for _ in range(count)
        ]


def main(argv: Sequence[str] | None = None) -> int:
    """Print the table of all recipes and worlds."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--recipes", nargs="+", default=RECIPES, help=f"(default: {' '.join(RECIPES)})")
    parser.add_argument("--ranks", type=int, nargs="+", default=RANKS, help=f"(default: {' '.join(map(str, RANKS))})")
    parser.add_argument("--problems", type=int, default=4, help="problems per replica (default: 4)")
    parser.add_argument("--samples", type=int, default=4, help="samples per problem (default: 4)")
    parser.add_argument("--prompt", type=int, default=300, help="tokens of a prompt (default: 300)")
    parser.add_argument("--response", type=int, default=1400, help="tokens of a response (default: 1400)")
    options = parser.parse_args(argv)
    batch = Batch(options.problems, options.samples, options.prompt, options.response)
    print("| recipe | ranks | replicas | rank 0: bytes | messages | another rank: bytes | messages | sessions: bytes |")
    print("|---|---|---|---|---|---|---|---|")
    for recipe in options.recipes:
        config = load([f"recipe={recipe}"])
        for ranks in options.ranks:
            print(row(recipe, config, ranks, batch), flush=True)
    return 0


def row(recipe: str, config: Config, num_ranks: int, batch: Batch) -> str:
    """Return a row of the table."""
    try:
        world = CountedWorld(config.parallel, num_ranks)
    except ValueError as error:
        return f"| {recipe} | {num_ranks} | {error} | | | | | |"
    traffic = traffic_of(world, batch, config.rollout.engine_tp if config.rollout.placement == "colocated" else None)
    others = most(traffic[1:])
    numbers = [world.dp_size, *(n for one in (traffic[0], others) for n in (one.num_bytes, one.num_messages))]
    again = CountedWorld(config.parallel, num_ranks)
    numbers.append(most(traffic_of_sessions(again, batch.problems * batch.samples, 4000)).num_bytes)
    return f"| {recipe} | {num_ranks} | {' | '.join(f'{number:,}' for number in numbers)} |"


def most(traffic: Iterable[Traffic]) -> Traffic:
    """Return the most bytes and the most messages of any rank."""
    traffic = list(traffic)
    return Traffic(max(one.num_bytes for one in traffic), max(one.num_messages for one in traffic))


def traffic_of(world: CountedWorld, batch: Batch, engine_tp: int | None) -> list[Traffic]:
    """Return the traffic of each rank in one step; ``engine_tp`` is None for servers, to which rank 0 speaks."""
    [expected] = batch.responses(1)

    def step(grid: RankGrid) -> None:
        requests = batch.requests(grid.dp_rank)
        if engine_tp is None:
            gathered = gather_requests(requests, grid)
            answered = gathered.by_replica(dict(enumerate(batch.responses(len(gathered.requests)))))
            responses = return_responses(answered, [0], grid, len(requests))
        else:
            shares = EngineShares(len(requests), grid, engine_tp)
            responses = shares.collect(batch.responses(len(shares.distribute(requests))))
        assert responses == [expected] * len(requests)

    return world.run(step)


def traffic_of_sessions(world: CountedWorld, num_sessions: int, length: int) -> list[Traffic]:
    """Return the traffic of each rank for the replies of ``num_sessions`` sessions per replica, of ``length`` letters.

    The environment of `environments/episodes.py` replies to the last response of each episode.
    """

    def step(grid: RankGrid) -> None:
        keys = [SampleKey(1, f"{grid.dp_rank} {number}", 0) for number in range(num_sessions)]
        asked = {key: partial(Reply, "." * length) for key in keys[grid.replica_rank :: grid.replica_size]}
        sessions: Any = SimpleNamespace(grid=grid, concurrency=1)
        assert SessionEpisodes._gathered(sessions, asked, begins=False).keys() == set(keys)

    return world.run(step)


if __name__ == "__main__":
    raise SystemExit(main())
