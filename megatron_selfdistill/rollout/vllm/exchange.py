# Copyright (c) 2026 the megatron_selfdistill authors. Apache-2.0.
"""Send the requests of all replicas to engines with weights of their own, and return the responses to the replicas.

    gathered = gather_requests(requests, grid)  # the requests of all replicas, on every rank
    with raise_on_all_ranks(EngineError):
        generated = {index: response, ...}  # this rank's share; an error here is raised on all ranks
    responses = return_responses(generated, gathered)  # the responses to this replica's requests, in order

Every function is a collective over the world.
"""

from __future__ import annotations

import pickle
from collections import Counter
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import accumulate, pairwise
from typing import TYPE_CHECKING

import torch
import torch.distributed as dist

from megatron_selfdistill.checkpoint.formats.unpickler import loads_pickled
from megatron_selfdistill.distributed.collectives import gather_objects, raise_on_all_ranks
from megatron_selfdistill.errors import EngineError
from megatron_selfdistill.rollout.base import Request, Response, SamplingParams, require_room

if TYPE_CHECKING:
    from megatron_selfdistill.distributed.ranks import RankGrid


@dataclass(frozen=True)
class GatheredRequests:
    """The requests of all data-parallel replicas, as every rank holds them."""

    requests: list[Request]
    """All requests, in the order of the replicas."""
    own: Sequence[int]
    """Indices of the requests of this rank's replica."""
    by_rank: Sequence[Sequence[int]]
    """Indices of the requests of each rank's replica, by global rank; hashable."""
    device: torch.device
    """Device of the tensors that collectives exchange."""

    def only(self, indices: Collection[int]) -> GatheredRequests:
        """Return the same requests, of which only those of ``indices`` are to be answered."""
        by_rank = [tuple(i for i in own if i in indices) for own in self.by_rank]
        return replace(self, own=tuple(i for i in self.own if i in indices), by_rank=by_rank)


def gather_requests(requests: Sequence[Request], grid: RankGrid) -> GatheredRequests:
    """Return the requests of all replicas, in the order of the replicas, on every rank.

    ``requests`` belong to this data-parallel replica, and are the same on each of its ranks.
    Collectives: one all-gather of objects over the world.
    """
    shares = gather_objects((grid.dp_rank, list(requests) if grid.is_first_of_replica else []))
    by_replica: list[list[Request]] = [[] for _ in range(grid.dp_size)]
    for dp_rank, share in shares:
        by_replica[dp_rank] += share
    ranges = [range(first, end) for first, end in pairwise(accumulate(map(len, by_replica), initial=0))]
    everything = [request for share in by_replica for request in share]
    return GatheredRequests(everything, ranges[grid.dp_rank], [ranges[dp_rank] for dp_rank, _ in shares], grid.device)


def return_responses(generated: Mapping[int, Response], gathered: GatheredRequests) -> list[Response]:
    """Return the responses to the requests of this rank's replica, in order.

    ``generated`` holds the responses that this rank has, by index into ``gathered.requests``; exactly one rank has the
    response to each request.
    Collectives over the world: two all-to-alls, in which each rank receives the responses to the requests of its own
    replica and no others, and the collectives of `raise_on_all_ranks`.
    Raises: `EngineError` on all ranks alike if a request has no response or more than one.
    """
    shares = {
        indices: pickle.dumps([(index, vars(generated[index])) for index in indices if index in generated])
        for indices in set(gathered.by_rank)
    }
    received = _all_to_all([shares[indices] for indices in gathered.by_rank], gathered.device)
    found = [pair for share in received for pair in loads_pickled(share, "a share of responses")]
    counts = Counter(index for index, _ in found)
    wrong = [f"request {index} has {counts[index]}" for index in gathered.own if counts[index] != 1]
    with raise_on_all_ranks(EngineError):
        if wrong:
            raise EngineError(f"expected one response to each request, but {wrong[0]}")
    responses = {index: Response(**fields) for index, fields in found}
    return [responses[index] for index in gathered.own]


def _all_to_all(outgoing: Sequence[bytes], device: torch.device) -> list[bytes]:
    """Send ``outgoing[r]``, which is not empty, to each rank r; return what each rank sends to this one, by rank.

    Collectives: two all-to-alls over the world, of sizes and of bytes.
    """
    sizes = torch.tensor([len(data) for data in outgoing], device=device)
    received_sizes = torch.empty_like(sizes)
    dist.all_to_all_single(received_sizes, sizes)
    output_sizes = received_sizes.tolist()
    received = torch.empty(sum(output_sizes), dtype=torch.uint8, device=device)
    sent = torch.frombuffer(bytearray().join(outgoing), dtype=torch.uint8).to(device)
    dist.all_to_all_single(received, sent, output_sizes, [len(data) for data in outgoing])
    return [part.numpy().tobytes() for part in received.cpu().split(output_sizes)]


def check_requests(
    requests: Sequence[Request], params: SamplingParams, max_length: int, *, guided: bool, who: str
) -> None:
    """Raise ValueError if a request cannot be answered by ``who``, the engines of a sampler.

    Such a request has an empty prompt, a prompt that leaves no room for ``max_new_tokens`` within ``max_length`` or,
    unless ``guided``, a teacher's prompt.
    """
    prompts = [prompt for r in requests for prompt in (r.prompt, r.teacher_prompt) if prompt is not None]
    lengths = [len(prompt) for prompt in prompts]
    require_room(min(lengths, default=1), max(lengths, default=0), params.max_new_tokens, max_length)
    if not guided and any(request.teacher_prompt is not None for request in requests):
        raise ValueError(
            f"a request has a teacher's prompt, but {who} were built without guided decoding; set "
            "rollout.guidance=mixed"
        )


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
