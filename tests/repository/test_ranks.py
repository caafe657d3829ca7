# Copyright (c) 2026 the megatron_selfdistill authors. Apache-2.0.
"""The pool of gloo ranks does what tests rely on: it communicates, tells failures apart, survives them."""

from __future__ import annotations

import importlib
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType

import pytest
import rank_worker
import torch
import torch.distributed as dist
from ranks import RankError, RankPool


@dataclass(frozen=True)
class Message:
    text: str
    tensor: torch.Tensor


def sum_of_ranks(start: int) -> int:
    value = torch.tensor(start + dist.get_rank())
    dist.all_reduce(value)
    return int(value)


def group_and_environment() -> tuple[int, int, str, str, int]:
    names = os.environ["RANK"], os.environ["WORLD_SIZE"]
    return dist.get_rank(), dist.get_world_size(), *names, torch.get_num_threads()


def echo(message: Message, *, suffix: str) -> Message:
    return Message(f"{message.text}{suffix} {dist.get_rank()}", message.tensor * 2)


def process_id() -> int:
    return os.getpid()


def fail_on(rank: int) -> None:
    if dist.get_rank() == rank:
        values = [1, 2, 3]
        assert sum(values) == 7, "the sum is wrong"
    dist.barrier()


def sleep_on(rank: int, seconds: float) -> None:
    if dist.get_rank() == rank:
        time.sleep(seconds)


def fail_on_rank_0_while_others_sleep() -> None:
    dist.barrier()  # a rank that is still joining the group would notice
    if dist.get_rank() == 0:
        raise KeyError("nobody will hear")
    time.sleep(60)


def die_on(rank: int) -> None:
    if dist.get_rank() == rank:
        print("last words", flush=True)
        os.kill(os.getpid(), signal.SIGKILL)
    dist.barrier()


def skip_everywhere() -> None:
    pytest.skip("not on this machine")


def make_own_group() -> int:
    dist.init_process_group("gloo")
    return sum_of_ranks(0)


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


def forks_of_a_save(directory: Path) -> tuple[int, list[str]]:
    """Return how often this rank forks for a checkpoint, and the names of the files with the tensors."""
    import checkpointed_run

    forks: list[int] = []
    run = checkpointed_run.start(checkpointed_run.Setup(teacher="current"), directory)
    os.register_at_fork(before=lambda: forks.append(1))
    written = run.save(1)
    return len(forks), sorted(file.name for file in written.glob("*.distcp"))


def test_collectives_work_at_every_world_size(ranks):
    for world_size in (4, 1, 2, 3):
        expected = sum(10 + rank for rank in range(world_size))
        assert ranks.run(sum_of_ranks, 10, world_size=world_size) == [expected] * world_size


def test_each_rank_has_its_group_environment_and_one_thread(ranks):
    expected = [(rank, 2, str(rank), "2", 1) for rank in range(2)]
    assert ranks.run(group_and_environment, world_size=2) == expected


def test_arguments_and_results_may_be_classes_of_the_test_file(ranks):
    results = ranks.run(echo, Message("rank", torch.ones(2)), suffix=":", world_size=2)
    assert [result.text for result in results] == ["rank: 0", "rank: 1"]
    assert all(torch.equal(result.tensor, torch.full((2,), 2.0)) for result in results)


def test_every_call_has_processes_of_its_own_that_have_ended_with_it(ranks):
    first, second = ranks.run(process_id, world_size=2), ranks.run(process_id, world_size=2)
    assert len({*first, *second}) == 4
    assert not any(Path(f"/proc/{pid}").exists() for pid in (*first, *second))


def test_a_call_finds_nothing_of_what_the_last_one_left(ranks):
    before = ranks.run(state_found, world_size=2)
    ranks.run(leave_state_behind, world_size=2)
    assert before[0][:4] == (False, False, False, False)
    assert ranks.run(state_found, world_size=2) == before


def test_a_function_can_make_its_own_group_from_the_environment(ranks):
    assert ranks.run(make_own_group, world_size=2, init_process_group=False) == [1, 1]


@pytest.mark.full
def test_a_rank_writes_the_files_of_a_checkpoint_without_further_processes(ranks, tmp_path):
    assert ranks.run(forks_of_a_save, tmp_path, world_size=1) == [(0, ["__0_0.distcp", "__0_1.distcp"])]


def test_a_failure_names_the_rank_and_shows_its_values(ranks):
    with pytest.raises(RankError, match=r"(?s)on rank 1 of 3.*the sum is wrong\nassert 6 == 7"):
        ranks.run(fail_on, 1, world_size=3)
    assert ranks.run(sum_of_ranks, 0, world_size=3) == [3, 3, 3]


def test_ranks_that_do_not_notice_a_failure_are_killed(ranks, monkeypatch):
    monkeypatch.setattr("ranks._GRACE_SECONDS", 0.2)
    with pytest.raises(RankError, match=r"(?s)rank 0 of 2.*nobody will hear.*rank 1: still waiting, killed"):
        ranks.run(fail_on_rank_0_while_others_sleep, world_size=2)
    assert ranks.run(sum_of_ranks, 0, world_size=2) == [1, 1]


def test_a_hang_is_reported_with_the_stack_of_the_rank_that_hangs(ranks):
    with pytest.raises(RankError, match=r"(?s)within 5 s on rank\(s\) \[1\] of 2.*in sleep_on"):
        ranks.run(sleep_on, 1, 60.0, world_size=2, timeout=5.0)  # enough for rank 0 on a busy machine
    assert ranks.run(sum_of_ranks, 0, world_size=2) == [1, 1]


def test_a_killed_rank_is_reported_with_its_last_output(ranks):
    with pytest.raises(RankError, match=r"(?s)failed on rank 1 of 2.*exit code -9.*last words"):
        ranks.run(die_on, 1, world_size=2)
    assert ranks.run(sum_of_ranks, 0, world_size=2) == [1, 1]


def test_a_skip_inside_a_rank_skips_the_test(ranks):
    with pytest.raises(pytest.skip.Exception, match="not on this machine"):
        ranks.run(skip_everywhere, world_size=1)


def test_functions_inside_functions_are_refused_with_a_message(ranks):
    with pytest.raises(ValueError, match="expected a function at the top of a module"):
        ranks.run(lambda: None, world_size=1)
    with pytest.raises(ValueError, match="expected a world_size from 1 to 8, got 9"):
        ranks.run(process_id, world_size=9)


@pytest.fixture
def calls(tmp_path, monkeypatch) -> Iterator[ModuleType]:
    """Yield a module for ranks that do not need torch, so that a new server starts at once."""
    (tmp_path / "calls.py").write_text(
        "import os, pathlib\n"
        "def work(directory):\n"
        "    pathlib.Path(directory, str(os.getpid())).touch()\n"
        "    while True: pass\n"
    )
    (tmp_path / "pids").mkdir()
    monkeypatch.syspath_prepend(tmp_path)
    yield importlib.import_module("calls")
    del sys.modules["calls"]


def test_a_call_that_is_interrupted_ends_with_its_ranks(calls, tmp_path):
    """Ctrl-C in a test must leave neither processes behind nor an answer for the next call."""
    pids, pool = tmp_path / "pids", RankPool(preloaded=())

    def interrupt(*unused):
        raise KeyboardInterrupt

    def interrupt_once_both_work():
        while len(list(pids.iterdir())) < 2:
            time.sleep(0.05)
        signal.pthread_kill(threading.main_thread().ident, signal.SIGALRM)

    before = signal.signal(signal.SIGALRM, interrupt)
    try:
        threading.Thread(target=interrupt_once_both_work, daemon=True).start()
        with pytest.raises(KeyboardInterrupt):
            pool.run(calls.work, pids, world_size=2, init_process_group=False)
    finally:
        signal.signal(signal.SIGALRM, before)
    assert not any(Path(f"/proc/{file.name}").exists() for file in pids.iterdir())
    assert pool.run(os.path.basename, "the/answer", world_size=2, init_process_group=False) == ["answer"] * 2
    pool.close()


def test_ranks_end_when_the_session_is_killed(calls, tmp_path):
    """A busy rank, too: nothing may go on running on the machine of someone who killed pytest."""
    pids, script = tmp_path / "pids", tmp_path / "session.py"
    script.write_text(
        "import calls, ranks\n"
        f"ranks.RankPool(preloaded=()).run(calls.work, {str(pids)!r}, world_size=2, init_process_group=False)\n"
    )
    environment = os.environ | {"PYTHONPATH": str(Path(rank_worker.__file__).parent)}
    with subprocess.Popen([sys.executable, str(script)], env=environment) as session:
        while len(numbers := [file.name for file in pids.iterdir()]) < 2:
            assert session.poll() is None
            time.sleep(0.02)
        session.kill()
    deadline = time.monotonic() + 60
    while any(Path(f"/proc/{number}").exists() for number in numbers) and time.monotonic() < deadline:
        time.sleep(0.1)
    assert not any(Path(f"/proc/{number}").exists() for number in numbers)
