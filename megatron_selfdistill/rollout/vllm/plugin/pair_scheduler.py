# Copyright (c) 2026 the megatron_selfdistill authors. Apache-2.0.
"""A scheduler for engines to which the halves of a guided pair come one by one: the first waits for the second.

A server gets each half as a message of its own.  Without this scheduler, an idle engine begins with the first half as
soon as it comes, and that half, alone in its batch, can only stop.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

from vllm.v1.core.sched.scheduler import Scheduler
from vllm.v1.request import Request, RequestStatus

from megatron_selfdistill.rollout.vllm.protocol import PairHalf


class PairScheduler(Scheduler):
    """vLLM's own scheduler, which gets a half only when both have come; named by its path in ``scheduler_cls``."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self._waits_for_partner: dict[str, Request] = {}  # by the pair's name

    def add_request(self, request: Request) -> None:
        """Add a request, or hold the first half of a pair back until the second has come."""
        half = PairHalf.of(request.sampling_params.extra_args) if request.sampling_params else None
        if half is not None:
            partner = self._waits_for_partner.pop(half.pair, None)
            if partner is None:
                self._waits_for_partner[half.pair] = request
                return
            super().add_request(partner)
        super().add_request(request)

    def finish_requests(self, request_ids: str | Iterable[str] | None, finished_status: RequestStatus) -> list[Request]:
        """Finish requests as vLLM's scheduler does, also halves that wait here: their client has gone."""
        wanted = {request_ids} if isinstance(request_ids, str) else None if request_ids is None else set(request_ids)
        for name, request in list(self._waits_for_partner.items()):
            if wanted is None or request.request_id in wanted:
                super().add_request(self._waits_for_partner.pop(name))
        finished: list[Request] = super().finish_requests(wanted, finished_status)
        return finished
