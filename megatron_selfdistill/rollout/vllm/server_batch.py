# Copyright (c) 2026 the megatron_selfdistill authors. Apache-2.0.
"""A batch of requests that vLLM servers answer in a thread of rank 0, while the trainer may do something else."""

from __future__ import annotations

import threading
from collections.abc import Callable, Collection, Mapping, Sequence
from concurrent.futures import Future
from dataclasses import dataclass
from itertools import pairwise

from megatron_selfdistill.errors import EngineError
from megatron_selfdistill.rollout.base import Request, Response, SamplingParams
from megatron_selfdistill.rollout.streaming import Arrivals, BusyTime
from megatron_selfdistill.rollout.vllm import coroutines
from megatron_selfdistill.rollout.vllm.client import VllmServer
from megatron_selfdistill.rollout.vllm.dispatch import DispatchResult, Task, dispatch
from megatron_selfdistill.rollout.vllm.engine import engine_request, response_of
from megatron_selfdistill.rollout.vllm.exchange import GatheredRequests, WeightAge
from megatron_selfdistill.rollout.vllm.pairs import PairCounts, guided_responses


@dataclass(frozen=True)
class Ticket:
    """A batch of requests that servers work on."""

    gathered: GatheredRequests
    batch: ServerBatch | None
    """The work itself, on rank 0; None on the other ranks."""


class ServerBatch:
    """Requests that servers answer in a thread of this process."""

    def __init__(
        self,
        requests: Sequence[Request],
        params: SamplingParams,
        age: WeightAge,
        servers: Sequence[VllmServer],
        known: Mapping[int, Response],
        bare_roles: Collection[str],
        busy_time: BusyTime,
    ) -> None:
        """Begin the work, which calls no collective.

        ``servers``: those with weights of the age; the list is empty where every response is ``known``, by index.
        ``bare_roles``: as for `generate_guided`.  ``busy_time`` counts the time of the work.
        """
        self.requests, self.params = requests, params
        self._age, self._servers, self._bare_roles = age, servers, bare_roles
        self._todo = [i for i in range(len(requests)) if i not in known]
        self._cancelled = threading.Event()
        self._pair_counts: list[PairCounts] = []
        self._dispatched: DispatchResult[list[Response]] | None = None
        self.arrivals = Arrivals(self._answer, known, busy_time)
        """The responses so far."""

    def finish(self) -> None:
        """Wait until all responses are there; raise `EngineError` where no server is left for a request."""
        self.arrivals.join()

    def cancel(self) -> None:
        """Begin no further request; the caller interrupts those that servers work on."""
        self._cancelled.set()

    @property
    def failures(self) -> Mapping[VllmServer, EngineError]:
        """The servers that have failed at a request, once the batch is finished."""
        return {} if self._dispatched is None else self._dispatched.failures

    @property
    def counts(self) -> dict[str, int]:
        """The metrics rollout/requests_retried and, where guided, rollout/guided_repairs, once finished."""
        if self._dispatched is None:
            return {}
        counts = {"rollout/requests_retried": self._dispatched.num_retried}
        if self._pair_counts:
            counts["rollout/guided_repairs"] = sum(each.repairs for each in self._pair_counts)
        return counts

    def _answer(self, arrived: Callable[[Mapping[int, Response]], None]) -> None:
        """Let the servers answer; call ``arrived`` with the responses by index, as they come."""
        if not self._todo:
            return
        plain = [i for i in self._todo if self.requests[i].teacher_prompt is None]
        guided = [i for i in self._todo if self.requests[i].teacher_prompt is not None]
        # The driver of pairs keeps them equally long, so a server gets all its pairs at once.
        cuts = [len(guided) * i // len(self._servers) for i in range(len(self._servers) + 1)]
        groups = [[i] for i in plain]
        groups += [guided[first:behind] for first, behind in pairwise(cuts) if first < behind]

        def returned(task: int, responses: list[Response]) -> None:
            arrived(dict(zip(groups[task], responses, strict=True)))

        tasks = [self._task([self.requests[i] for i in group]) for group in groups]
        self._dispatched = dispatch(tasks, self._servers, returned)

    def _task(self, requests: Sequence[Request]) -> Task[list[Response]]:
        """Return the task of one server: one plain response, or guided responses that are sampled together."""

        def recent(responses: list[Response], server: VllmServer) -> list[Response]:
            for response in responses:
                self._age.require(response.weight_version, server.name)
            return responses

        async def guided(server: VllmServer) -> list[Response]:
            own_counts = PairCounts()
            responses = await guided_responses(server.calls, requests, self.params, own_counts, self._bare_roles)
            self._pair_counts.append(own_counts)
            return recent(responses, server)

        def begin(server: VllmServer) -> Future[list[Response]]:
            if self._cancelled.is_set():
                raise EngineError(f"{server.address}: given up, since the sampler was closed")
            if requests[0].teacher_prompt is not None:
                return coroutines.begin(guided(server))
            request = engine_request(requests[0], self.params)
            return server.begin(request, lambda output: recent([response_of(output, self.params)], server))

        return begin
