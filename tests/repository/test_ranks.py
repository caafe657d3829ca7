# Copyright (c) 2026 the megatron_selfdistill authors. Apache-2.0.
"""The pool of gloo ranks tells failures apart and survives them."""

from __future__ import annotations

import os
import signal
import time

import pytest
import torch
import torch.distributed as dist
from ranks import RankError


def sum_of_ranks(start: int) -> int:
    value = torch.tensor(start + dist.get_rank())
    dist.all_reduce(value)
    return int(value)


def fail_on(rank: int) -> None:
    if dist.get_rank() == rank:
        values = [1, 2, 3]
        assert sum(values) == 7, "the sum is wrong"
    dist.barrier()


def sleep_on(rank: int, seconds: float) -> None:
    if dist.get_rank() == rank:
        time.sleep(seconds)


def die_on(rank: int) -> None:
    if dist.get_rank() == rank:
        print("last words", flush=True)
        os.kill(os.getpid(), signal.SIGKILL)
    dist.barrier()


LIMIT_S = 5.0  # enough for rank 0 on a busy machine
FAILURES = {
    "raises": ((fail_on, 1), {}, r"(?s)on rank 1 of 2.*the sum is wrong\nassert 6 == 7"),
    "is killed": ((die_on, 1), {}, r"(?s)failed on rank 1 of 2.*exit code -9.*last words"),
    "hangs": ((sleep_on, 1, 600.0), {"timeout": LIMIT_S}, r"(?s)within [\d.]+ s on rank\(s\) \[1\] of 2.*in sleep_on"),
}


@pytest.mark.parametrize("way", ["raises", "is killed", pytest.param("hangs", marks=pytest.mark.full)])
def test_a_failure_names_the_rank_and_shows_why_and_the_next_call_works(ranks, way):
    call, options, message = FAILURES[way]
    with pytest.raises(RankError, match=message):
        ranks.run(*call, world_size=2, **options)
    assert ranks.run(sum_of_ranks, 0, world_size=2) == [1, 1]
