# Copyright (c) 2026 the megatron_selfdistill authors. Apache-2.0.
"""The time in which at least one work is under way."""

from __future__ import annotations

import time

from megatron_selfdistill.engines.vllm.server_batch import BusyTime


def test_works_at_the_same_time_count_once_and_a_work_under_way_counts_up_to_now():
    busy_time = BusyTime()
    began = time.perf_counter()
    with busy_time, busy_time:
        time.sleep(0.05)
    assert 0.05 <= busy_time.take() <= time.perf_counter() - began
    with busy_time:
        time.sleep(0.05)
        assert busy_time.take() >= 0.05
