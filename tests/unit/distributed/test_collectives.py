# Copyright (c) 2026 the megatron_selfdistill authors. Apache-2.0.
"""Values that travel between ranks, and errors that every rank raises alike."""

from __future__ import annotations

import time
from collections.abc import Callable
from functools import partial
from typing import Any

import pytest
import torch.distributed as dist

from megatron_selfdistill.distributed import collectives
from megatron_selfdistill.distributed.collectives import (
    broadcast_object,
    gather_items,
    gather_objects,
    max_over_ranks,
    min_over_ranks,
    raise_on_all_ranks,
    run_long_on_rank_0,
    run_on_each_rank,
    run_on_rank_0,
)
from megatron_selfdistill.errors import CheckpointError, ConfigError, EngineError, VerifierError


def gathered() -> list[Any]:
    rank = dist.get_rank()
    values = [gather_objects(f"rank {rank}"), gather_items(["x"] * rank), broadcast_object(("from", rank))]
    return [*values, max_over_ranks([rank, -rank]), min_over_ranks([rank, -rank])]


def test_every_rank_gets_the_values_of_all_ranks_in_their_order(ranks):
    expected = [["rank 0", "rank 1", "rank 2"], ["x"] * 3, ("from", 0), [2, 0], [0, -2]]
    assert ranks.run(gathered, world_size=3) == [expected] * 3


def raised(errors: list[Exception | None], unexpected: type[Exception] = EngineError) -> tuple[str, str] | None:
    """Return the type and the message that this rank raises where rank i meets ``errors[i]`` in its block."""
    own = errors[dist.get_rank()]
    found = None
    try:
        with raise_on_all_ranks(unexpected):
            if own is not None:
                raise own
    except Exception as error:
        assert error.__cause__ is own
        found = type(error).__name__, str(error)
    assert max_over_ranks([1]) == [1]  # all ranks have left the block, so the next collective meets
    return found


@pytest.mark.parametrize(
    ("errors", "expected"),
    [
        ([None, None], None),
        ([None, EngineError("gone")], ("EngineError", "rank 1: gone")),
        ([CheckpointError("no such file")] * 2, ("CheckpointError", "no such file")),
        ([ConfigError("first"), ValueError("second")], ("ConfigError", "rank 0: first; rank 1: second")),
        ([ValueError("no room"), None], ("ValueError", "rank 0: no room")),
        ([None, KeyError("x")], ("EngineError", "rank 1: KeyError: 'x'")),
        ([None, UnicodeDecodeError("utf-8", b"", 0, 1, "y")], ("EngineError", "rank 1: UnicodeDecodeError: ")),
        ([EngineError("a"), *[EngineError("b")] * 3, None], ("EngineError", "rank 0: a; ranks 1, 2, 3: b")),
    ],
)
def test_what_one_rank_raises_all_ranks_raise(ranks, errors, expected):
    for found in ranks.run(raised, errors, world_size=len(errors)):
        if expected is None:
            assert found is None
        else:
            assert (found[0], found[1].startswith(expected[1])) == (expected[0], True), found


def test_an_error_of_another_type_becomes_the_one_that_the_caller_names(ranks):
    assert ranks.run(raised, [OSError("full")], CheckpointError, world_size=1) == [("CheckpointError", "OSError: full")]


def fails(error: Exception) -> Any:
    raise error


def message_of(run: Callable[..., Any], error: Exception) -> str:
    with pytest.raises(type(error)) as caught:
        run(partial(fails, error))
    return str(caught.value)


@pytest.mark.parametrize("run", [run_on_rank_0, run_long_on_rank_0, run_on_each_rank])
@pytest.mark.parametrize("kind", [ConfigError, CheckpointError, EngineError, VerifierError, ValueError])
def test_an_error_for_the_user_keeps_its_type_and_message_on_every_rank(ranks, run, kind):
    assert ranks.run(message_of, run, kind("what to do"), world_size=2) == ["what to do"] * 2


def results() -> tuple[Any, Any]:
    rank = dist.get_rank()
    return run_on_rank_0(lambda: f"of {rank}"), run_on_each_rank(lambda: f"of {rank}")


def test_rank_0s_result_reaches_every_rank_and_each_ranks_own_stays_there(ranks):
    assert ranks.run(results, world_size=2) == [("of 0", "of 0"), ("of 0", "of 1")]


def run_long(meetings: int) -> tuple[Any, int]:
    """Return the result of `run_long_on_rank_0` and the number of broadcasts in which the ranks met.

    The work on rank 0 ends after so many of these ``meetings``.
    """
    rank, met = dist.get_rank(), []
    original = dist.broadcast

    def counted(*args: Any, **kwargs: Any) -> Any:
        met.append(1)
        return original(*args, **kwargs)

    def work() -> str:
        assert rank == 0
        while len(met) < meetings:
            time.sleep(0.01)
        return "done"

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(collectives, "_HEARTBEAT_SECONDS", 0.1)
        patch.setattr(dist, "broadcast", counted)
        return run_long_on_rank_0(work), len(met)


def test_work_of_rank_0_may_take_longer_than_a_collective_may_wait(ranks):
    first, second = ranks.run(run_long, 4, world_size=2)
    assert (first[0], second[0]) == ("done", None)
    assert first[1] == second[1] >= 4


def leave_from_a_thread() -> str:
    with pytest.raises(EngineError) as caught:
        run_long_on_rank_0(partial(fails, SystemExit(3)), EngineError)  # type: ignore[arg-type]
    return str(caught.value)


def test_a_thread_that_exits_does_not_leave_the_other_ranks_waiting(ranks):
    assert ranks.run(leave_from_a_thread, world_size=2) == ["SystemExit: 3"] * 2
