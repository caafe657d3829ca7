# Copyright (c) 2026 the megatron_selfdistill authors. Apache-2.0.
"""Send the requests of the replicas to engines with weights of their own, and the responses back to the replicas.

With servers, `gather_requests` brings all requests to rank 0, and `return_responses` the responses back.  With
colocated engines, the methods of `EngineShares` do so for the share of each engine.

Requests and responses travel from the ranks that have them to the ranks that need them (distributed/parcels.py): a
replica sends and receives through its first rank, which broadcasts responses to the others.  What a rank sends and
receives depends on its own replica and engine; with servers, only rank 0 handles the requests of the whole world.

Every function and method is a collective over the world, unless it says otherwise.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from itertools import accumulate, pairwise
from typing import TYPE_CHECKING

from megatron_selfdistill.distributed.integers import max_over_ranks
from megatron_selfdistill.distributed.parcels import broadcast_in_replica, exchange_parcels
from megatron_selfdistill.errors import EngineError
from megatron_selfdistill.rollout.base import Request, Response, SamplingParams
from megatron_selfdistill.rollout.sampling import require_room

if TYPE_CHECKING:
    from megatron_selfdistill.distributed.ranks import RankGrid


@dataclass(frozen=True)
class GatheredRequests:
    """The requests of all data-parallel replicas on rank 0, and how many of them this rank's replica has."""

    requests: Sequence[Request]
    """On rank 0 all requests, in the order of the replicas; on the other ranks nothing."""
    replicas: Mapping[int, range]
    """On rank 0 the indices of each replica's requests, by the global rank that is its first; elsewhere nothing."""
    num_own: int
    """Number of the requests of this rank's replica."""

    def by_replica(self, responses: Mapping[int, Response]) -> dict[int, dict[int, Response]]:
        """Return ``responses``, which have indices into `requests`, by first rank and index in the replica.

        No collective.
        """
        return {first: {i - own.start: responses[i] for i in own} for first, own in self.replicas.items()}


def gather_requests(requests: Sequence[Request], grid: RankGrid) -> GatheredRequests:
    """Return the requests of all replicas, in the order of the replicas, on rank 0.

    ``requests`` belong to this data-parallel replica, and are the same on each of its ranks.
    Collectives: those of `exchange_parcels`, in which the first rank of each replica sends to rank 0.
    """
    firsts = [grid.first_rank_of(replica) for replica in range(grid.dp_size)] if grid.rank == 0 else []
    received = exchange_parcels({0: requests} if grid.is_first_of_replica else {}, firsts, grid.device)
    ends = accumulate((len(received[first]) for first in firsts), initial=0)
    replicas = {first: range(*bounds) for first, bounds in zip(firsts, pairwise(ends), strict=True)}
    return GatheredRequests([r for first in firsts for r in received[first]], replicas, len(requests))


class EngineShares:
    """The requests of all replicas, one behind the other, cut into one share per colocated engine.

    Shares are equally long, give or take one request.  They are neighbours, since the samples of one problem share the
    KV cache of their prompt.
    """

    def __init__(self, num_own: int, grid: RankGrid, engine_tp: int) -> None:
        """Cut the requests of all replicas, of which this rank's replica has ``num_own``.

        ``engine_tp`` consecutive ranks are one engine; it divides the world's size.
        Collectives: an all-reduce of one integer per replica over the data-parallel group.
        """
        self._grid, self._tp = grid, engine_tp
        counts = max_over_ranks(
            [num_own if replica == grid.dp_rank else 0 for replica in range(grid.dp_size)], grid.dp_group
        )
        num_engines = grid.world_size // engine_tp
        self._replicas = [range(*bounds) for bounds in pairwise(accumulate(counts, initial=0))]
        cuts = [sum(counts) * engine // num_engines for engine in range(num_engines + 1)]
        self._engines = [range(*bounds) for bounds in pairwise(cuts)]
        self._own = self._replicas[grid.dp_rank]
        self._share = self._engines[grid.rank // engine_tp]

    def distribute(self, requests: Sequence[Request]) -> list[Request]:
        """Return the share of this rank's engine, on each of its ranks; ``requests`` are those of the replica.

        Collectives: those of `exchange_parcels`, in which the first rank of each replica sends to all ranks of the
        engines that answer its requests.
        """
        parts: dict[int, Sequence[Request]] = {}
        if self._grid.is_first_of_replica:
            for engine, common in _overlaps(self._own, self._engines):
                part = requests[common.start - self._own.start : common.stop - self._own.start]
                parts |= dict.fromkeys(range(engine * self._tp, (engine + 1) * self._tp), part)
        sources = [self._grid.first_rank_of(replica) for replica, _ in _overlaps(self._share, self._replicas)]
        received = exchange_parcels(parts, sources, self._grid.device)
        return [request for source in sources for request in received[source]]

    def collect(self, responses: Sequence[Response]) -> list[Response]:
        """Return the responses to the requests of this rank's replica, in order.

        ``responses``: those to the requests that `distribute` returned, in order; the first rank of each engine has
        them, and those of its other ranks are ignored.
        Collectives: those of `return_responses`, in which the first rank of each engine sends.
        """
        answered: dict[int, dict[int, Response]] = {}
        if self._grid.rank % self._tp == 0:
            of_share = dict(zip(self._share, responses, strict=True))
            for replica, common in _overlaps(self._share, self._replicas):
                start = self._replicas[replica].start
                answered[self._grid.first_rank_of(replica)] = {i - start: of_share[i] for i in common}
        sources = [engine * self._tp for engine, _ in _overlaps(self._own, self._engines)]
        return return_responses(answered, sources, self._grid, len(self._own))


def return_responses(
    answered: Mapping[int, Mapping[int, Response]], sources: Collection[int], grid: RankGrid, num_own: int
) -> list[Response]:
    """Return the responses to the ``num_own`` requests of this rank's replica, in order, on each of its ranks.

    ``answered``: the responses that this rank has, by the first rank of the replica that asked, and by index into the
    requests of that replica.  ``sources``: the ranks whose ``answered`` names the first rank of this replica; together
    they have one response to each request.
    Collectives: those of `exchange_parcels` and `broadcast_in_replica`.
    """
    received = exchange_parcels(answered, sources if grid.is_first_of_replica else [], grid.device)
    found = {i: response for part in received.values() for i, response in part.items()}
    found = broadcast_in_replica(found, grid)
    return [found[i] for i in range(num_own)]


def _overlaps(span: range, others: Sequence[range]) -> list[tuple[int, range]]:
    """Return the number of each of ``others`` that has indices of ``span``, and these indices."""
    common = [range(max(span.start, other.start), min(span.stop, other.stop)) for other in others]
    return [(number, indices) for number, indices in enumerate(common) if indices]


def check_requests(requests: Sequence[Request], params: SamplingParams, max_length: int) -> None:
    """Raise ValueError if vLLM engines cannot answer a request.

    Such a request has an empty prompt, or a prompt that leaves no room for ``max_new_tokens`` within ``max_length``.
    """
    lengths = [len(request.prompt) for request in requests]
    require_room(min(lengths, default=1), max(lengths, default=0), params.max_new_tokens, max_length)


@dataclass(frozen=True)
class WeightAge:
    """The weights that may generate a response."""

    used_at: int
    """Version of the student that will be trained on the response."""
    max_staleness: int
    """Number of steps by which the oldest weights of the response may be older."""

    def allows(self, version: int | None) -> bool:
        """Return whether a response whose oldest weights are ``version`` may be trained on; None is unknown."""
        return version is not None and 0 <= self.used_at - version <= self.max_staleness

    def require(self, version: int | None, who: str) -> None:
        """Raise `EngineError`, beginning with ``who``, for a response whose oldest weights are not allowed."""
        if not self.allows(version):
            raise EngineError(
                f"{who} generated a response with weights of version {version}, expected {self.used_at} "
                f"(rollout.max_staleness={self.max_staleness})"
            )
