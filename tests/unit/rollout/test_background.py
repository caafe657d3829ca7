# Copyright (c) 2026 the megatron_selfdistill authors. Apache-2.0.
"""A thread collects responses while the trainer does something else."""

from __future__ import annotations

import threading
from collections.abc import Mapping
from typing import Any

import pytest

from megatron_selfdistill.engines.vllm.background import Arrivals, BusyTime
from megatron_selfdistill.errors import EngineError
from megatron_selfdistill.rollout.base import Response


def responses_to(indices: Any, length: int = 3) -> dict[int, Response]:
    return {i: Response.unsampled([i] * length) for i in indices}


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
    assert sorted(arrivals.so_far()) == [0, 1, 5] and arrivals.so_far()[1].token_ids == [1, 1, 1]


def test_an_error_of_the_work_is_raised_where_responses_are_wanted():
    def work(arrived: Any) -> None:
        arrived(responses_to([0]))
        raise EngineError("the last server is gone")

    arrivals = Arrivals(work, {}, BusyTime())
    for call in (lambda: arrivals.wait_for(lambda finished: None), arrivals.join):
        with pytest.raises(EngineError, match="the last server is gone"):
            call()
