# Copyright (c) 2026 the megatron_selfdistill authors. Apache-2.0.
"""The pool of gloo ranks does what tests rely on: it communicates, tells failures apart, survives them."""

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


def leave_state_behind() -> None:
    from megatron.core import parallel_state
    from megatron.core.num_microbatches_calculator import init_num_microbatches_calculator
    from megatron.core.tensor_parallel.random import model_parallel_cuda_manual_seed

    parallel_state.initialize_model_parallel(tensor_model_parallel_size=2)
    init_num_microbatches_calculator(dist.get_rank(), None, 4, 1, 1)
    model_parallel_cuda_manual_seed(7)
    os.environ["LEFT_BEHIND"] = "1"
    torch.set_default_dtype(torch.float64)
    torch.set_grad_enabled(False)
    torch.rand(3)


def state_found() -> tuple[bool, bool, bool, bool, torch.dtype, bool, float]:
    from megatron.core import num_microbatches_calculator, parallel_state
    from megatron.core.tensor_parallel import random

    return (
        parallel_state.model_parallel_is_initialized(),
        num_microbatches_calculator._GLOBAL_NUM_MICROBATCHES_CALCULATOR is not None,
        random._CUDA_RNG_STATE_TRACKER_INITIALIZED,
        "LEFT_BEHIND" in os.environ,
        torch.get_default_dtype(),
        torch.is_grad_enabled(),
        float(torch.rand(1)),
    )


def test_collectives_work_at_every_world_size(ranks):
    for world_size in (4, 1, 2, 3):
        expected = sum(10 + rank for rank in range(world_size))
        assert ranks.run(sum_of_ranks, 10, world_size=world_size) == [expected] * world_size


def test_a_call_finds_nothing_of_what_the_last_one_left(ranks):
    before = ranks.run(state_found, world_size=2)
    ranks.run(leave_state_behind, world_size=2)
    assert before[0][:4] == (False, False, False, False)
    assert ranks.run(state_found, world_size=2) == before


def test_a_failure_names_the_rank_and_shows_its_values(ranks):
    with pytest.raises(RankError, match=r"(?s)on rank 1 of 3.*the sum is wrong\nassert 6 == 7"):
        ranks.run(fail_on, 1, world_size=3)
    assert ranks.run(sum_of_ranks, 0, world_size=3) == [3, 3, 3]


@pytest.mark.full
def test_a_hang_is_reported_with_the_stack_of_the_rank_that_hangs(ranks):
    limit = 5 * 1.25 ** max(os.nice(0), 0)
    with pytest.raises(RankError, match=rf"(?s)within {limit:g} s on rank\(s\) \[1\] of 2.*in sleep_on"):
        ranks.run(sleep_on, 1, 600.0, world_size=2, timeout=5.0)  # enough for rank 0 on a busy machine
    assert ranks.run(sum_of_ranks, 0, world_size=2) == [1, 1]


def test_a_killed_rank_is_reported_with_its_last_output(ranks):
    with pytest.raises(RankError, match=r"(?s)failed on rank 1 of 2.*exit code -9.*last words"):
        ranks.run(die_on, 1, world_size=2)
    assert ranks.run(sum_of_ranks, 0, world_size=2) == [1, 1]
