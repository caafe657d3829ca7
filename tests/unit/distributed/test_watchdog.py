# Copyright (c) 2026 the megatron_selfdistill authors. Apache-2.0.
"""A rank that hangs is named, every rank's stack is written, and the run ends; one that is slow is left alone."""

from __future__ import annotations

import contextlib
import os
import subprocess
import sys
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path
from typing import Any

import hanging_run
import pytest
import tiny_run
from ranks import RankError
from tiny_run import overrides, train

from megatron_selfdistill.config import Config, load
from megatron_selfdistill.distributed import signs_of_life, watchdog
from megatron_selfdistill.distributed.watchdog import Report, hanging

TESTS = Path(__file__).resolve().parents[2]


def report(place: int = 7, waits: bool = True, stalled: bool = True, **entered: int) -> Report:
    return Report(tick=3, stalled=stalled, place=place, phase="train", waits=waits, host="node1", collectives=entered)


MISSED = {  # rank 3 missed one of ranks 2 and 3; rank 2 therefore one of the world, in which 0 and 1 wait
    **{rank: report(waits=False, world=5, tp=8) for rank in (0, 1)},
    **{rank: report(waits=False, world=4, tp2=11 - rank) for rank in (2, 3)},
}


@pytest.mark.parametrize(
    ("reports", "silent", "named"),
    [
        ({0: report(), 1: report(place=5), 2: report()}, [2], [2]),
        ({0: report(waits=False), 1: report(place=5), 2: report()}, [], [1]),
        ({0: report(), 1: report(waits=False), 2: report()}, [], [1]),
        ({0: report(waits=True), 1: report(waits=True)}, [], []),
        ({0: report(waits=False), 1: report(waits=False)}, [], []),
        (MISSED, [], [3]),
        ({0: report()}, [], [0]),
    ],
    ids=[
        *("no longer speaks", "is behind in the phases", "waits for nobody", "all wait", "none waits"),
        *("missed a collective", "a world of one"),
    ],
)
def test_the_rank_that_hangs_is_named_unless_all_look_alike(reports, silent, named):
    assert list(hanging(reports, frozenset(silent))) == named


def test_by_default_a_hang_is_seen_before_collectives_give_up():
    assert Config().stop.hang_timeout_s(30) == 25 * 60
    assert Config().stop.hang_timeout_s(60) == 50 * 60
    assert load(["stop.hang_timeout_minutes=0"]).stop.hang_timeout_s(30) is None


def hung(data: Path, run_dir: Path, how: str, rank: int, world_size: int = 2) -> subprocess.CompletedProcess[str]:
    """Run torchrun on a run that hangs; torchrun ends its workers a second after it has lost one."""
    paths = [str(TESTS / "support"), str(TESTS.parent), str(TESTS.parent / "examples")]
    environment = os.environ | {
        "PYTHONPATH": os.pathsep.join(paths),
        "OMP_NUM_THREADS": "1",
        "TORCH_ELASTIC_SHUTDOWN_TIMEOUT": "1",
        "CUDA_VISIBLE_DEVICES": "",
        "GLOO_SOCKET_IFNAME": "lo0" if sys.platform == "darwin" else "lo",
    }
    launcher = ["-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={world_size}"]
    command = [sys.executable, *launcher, str(TESTS / "support" / "hanging_run.py"), how, str(rank)]
    arguments = overrides(data, run_dir, "stop.hang_timeout_minutes=0.1")
    return subprocess.run(command + arguments, env=environment, capture_output=True, text=True)


def assert_named_with_stacks(run_dir: Path, rank: int, minutes: str, output: str) -> None:
    verdict = (run_dir / "stacks" / "verdict.txt").read_text()
    assert f"] {verdict}" in output and f"no rank has made progress for {minutes} minutes" in verdict
    assert f": rank {rank} on " in verdict and f"rank {1 - rank} on" not in verdict
    stacks = {r: (run_dir / "stacks" / f"rank_{r}.txt").read_text() for r in (0, 1)}
    assert "hanging_run.py" in stacks[rank] and "in pack_or_hang" in stacks[rank]
    assert "most recent call first" in stacks[1 - rank] and "in <lambda>" not in stacks[1 - rank]


def test_a_rank_that_hangs_is_named_with_every_ranks_stack_and_all_ranks_end(ranks, data, tmp_path):
    arguments = overrides(data, tmp_path / "run", "stop.hang_timeout_minutes=0.05")
    with pytest.raises(RankError, match=f"exit code {watchdog.EXIT_HUNG} ") as ended:
        ranks.run(hanging_run.main, "sleeps", "1", arguments, world_size=2, init_process_group=False)
    assert_named_with_stacks(tmp_path / "run", 1, "0.05", str(ended.value))
    assert str(ended.value).endswith("Afterwards: rank 1: died")


@pytest.mark.full
@pytest.mark.parametrize(("how", "rank"), [("sleeps", 1), ("sleeps unseen", 1), ("holds the interpreter", 0)])
def test_a_rank_that_hangs_under_torchrun_is_named_with_every_ranks_stack_and_the_run_ends(data, tmp_path, how, rank):
    ended = hung(data, tmp_path / "run", how, rank)
    assert ended.returncode != 0
    assert_named_with_stacks(tmp_path / "run", rank, "0.1", ended.stderr)
    assert "exitcode  : 5" in ended.stderr


def copies(directory: Path) -> None:
    (directory / "file").write_bytes(bytes(2**21))


@pytest.mark.skipif(sys.platform != "linux", reason="elsewhere nobody counts what a process writes")
@pytest.mark.parametrize("by_a_child", [False, True])
def test_files_that_move_are_signs_where_a_library_loads_or_saves_and_only_there(tmp_path, by_a_child):
    watch = watchdog._Watch(0, 1, tmp_path / "stacks", timeout_s=10.0)

    def verdict_after_copies() -> str | None:
        for _ in range(4):
            watch._clock += 5
            with ProcessPoolExecutor(1) if by_a_child else contextlib.nullcontext() as pool:
                pool.submit(copies, tmp_path).result() if pool else copies(tmp_path)
                if (verdict := watch._verdict()) is not None:
                    return verdict
        return None

    with signs_of_life.moving_files():
        assert watch._verdict() is None
        assert verdict_after_copies() is None
    assert watch._verdict() is None
    assert "rank 0 on" in verdict_after_copies()
    with signs_of_life.moving_files():
        assert watch._verdict() is None
        watch._clock += 10
        assert "rank 0 on" in watch._verdict()


def noted(arguments: list[str], path: Path) -> int:
    """Start a run in which each load and save records whether moved files are signs of progress."""
    from megatron_selfdistill.checkpoint import sharded_io
    from megatron_selfdistill.checkpoint.checkpointer import Checkpointer

    def noting(name: str, original: Callable[..., Any]) -> Callable[..., Any]:
        def note(*args: Any, **kwargs: Any) -> Any:
            with path.open("a") as file:
                print(name, *kwargs.values(), signs_of_life._signs.moving_files > 0, file=file)
            return original(*args, **kwargs)

        return note

    with pytest.MonkeyPatch.context() as patch:
        for owner, name in ((sharded_io, "read"), (Checkpointer, "_finalize"), (sharded_io, "write_now")):
            patch.setattr(owner, name, noting(name, getattr(owner, name)))
        return tiny_run.start(arguments)


@pytest.mark.full
def test_whatever_loads_and_saves_counts_the_files_that_it_moves(ranks, data, tmp_path):
    for steps in (1, 2):
        arguments = overrides(data, tmp_path / "run", f"num_steps={steps}")
        train(ranks, arguments, 1, start=noted, path=tmp_path / "notes")
    notes = (tmp_path / "notes").read_text().split("\n")
    expected = {"read True", "write_now True", "_finalize True True"}
    assert expected == {note for note in notes if note}


@pytest.mark.full
def test_a_rank_that_hangs_before_its_first_sign_is_named_with_its_host(data, tmp_path):
    hung(data, tmp_path / "run", "holds the interpreter at once", 0)
    assert ": rank 0 on " in (tmp_path / "run" / "stacks" / "verdict.txt").read_text()


@pytest.mark.full  # torchrun waits for half a minute for a process that is stopped
def test_a_rank_that_is_stopped_is_named(data, tmp_path):
    ended = hung(data, tmp_path / "run", "is stopped", 1)
    verdict = (tmp_path / "run" / "stacks" / "verdict.txt").read_text()
    assert ended.returncode != 0 and "rank 1" in verdict and "no longer answers" in verdict
    assert f"] {verdict}" in ended.stderr


def verdicts_while_a_rank_beats(directory: Path) -> list[list[str | None]]:
    """Return this rank's verdicts in three spans of 40 s each: rank 0 makes progress, then rank 1, then no rank."""
    from torch import distributed as dist

    from megatron_selfdistill.distributed.roll_call import launch_store

    rank = dist.get_rank()
    store = launch_store("keeper", 2, 60.0, may_keep=True) if rank == 0 else None
    dist.barrier()
    watch = watchdog._Watch(rank, 2, directory, timeout_s=10.0)
    verdicts: list[list[str | None]] = []
    for beating in (0, 1, None):
        verdicts.append([])
        for _ in range(10):
            watch._clock += 4.0  # the clock of the watch stands still otherwise: its thread does not run
            if rank == beating:
                signs_of_life.beat()
            verdicts[-1].append(watch._verdict())
            dist.barrier()
    del store
    return verdicts


def test_slow_ranks_that_others_wait_for_are_no_hang(ranks, tmp_path):
    for rank, verdicts in enumerate(ranks.run(verdicts_while_a_rank_beats, tmp_path / "stacks", world_size=2)):
        rank_0_beats, rank_1_beats, no_rank_beats = verdicts
        assert rank_0_beats == rank_1_beats == [None] * 10
        assert no_rank_beats[:2] == [None] * 2, "less than the timeout"
        if rank == 0:  # the judge
            assert "no rank has made progress for 0.167 minutes" in str(no_rank_beats[-1])
