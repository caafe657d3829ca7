# Copyright (c) 2026 the megatron_selfdistill authors. Apache-2.0.
"""Sessions in processes: state, failures by name, limits, and that nothing outlives its rank."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
from sessions import pid_of

from megatron_selfdistill.data.episode_reply import Reply
from megatron_selfdistill.data.problems import Problem
from megatron_selfdistill.environments import session_processes
from megatron_selfdistill.environments.environment import SessionLimits
from megatron_selfdistill.environments.session_processes import SessionProcesses, _variables


def problem(answer: str = "fine") -> Problem:
    return Problem("p", ({"role": "user", "content": "3 - 4"},), "hint", answer, "file:7")


@pytest.fixture(scope="module")
def pool() -> Iterator[SessionProcesses]:
    """Return sessions of `sessions.Told`, with half a second for each reply and 0.3 GB of memory."""
    made = SessionProcesses("sessions.Told", {}, SessionLimits(seconds=0.5, memory_gb=0.3))
    yield made
    made.close()


def group_of(pool: SessionProcesses, key: str) -> int:
    """Return the process group of a session."""
    return pool._sessions[key][1]


def test_each_session_has_a_state_of_its_own_and_the_seed_of_its_sample(pool):
    assert [pool.reset(key, problem(), seed).text for key, seed in (("a", 1), ("b", 2))] == ["fine 1", "fine 2"]
    replies = [pool.step(key, "go").text for key in "aabab"]
    assert replies == ["#1", "#2", "#1", "#3", "#2"]
    groups = [group_of(pool, key) for key in "ab"]
    assert os.getpgrp() not in groups and len(set(groups)) == 2
    pool.end_all()
    assert "a" not in pool and not left_of(*groups)


def test_a_session_may_begin_with_a_hint():
    pool = SessionProcesses("sessions.Hinting", {}, SessionLimits())
    try:
        assert pool.reset("a", problem(), 1) == Reply(" go", hint="north", done=False)
    finally:
        pool.close()


@pytest.mark.parametrize(
    ("word", "reason"),
    [
        ("raise", "step raised KeyError: 'no such tool'"),
        ("exit", "step raised SystemExit: 0"),
        ("die", "the process of the session ended in step: status 3"),
        ("kill", "the process of the session ended in step: signal SIGKILL"),
        ("memory", "step raised MemoryError: "),
        ("nan", "step raised ValueError: expected a finite number as reward of a reply, got nan"),
        ("half", "step raised ValueError: \\ud83d"),
        ("text", "step raised TypeError: expected a Reply of megatron_selfdistill.environments, got 'no reply'"),
    ],
)
def test_a_session_that_fails_is_a_reply_with_the_reason_and_costs_no_other_session_anything(pool, word, reason):
    for key in ("bad", "good"):
        pool.reset(key, problem(), 1)
    group = group_of(pool, "bad")
    failure = pool.step("bad", word).failure or ""
    assert failure.partition("\n")[0] == reason and not pool_goes_on(pool, "bad", group)
    assert word != "raise" or failure.endswith('    raise KeyError("no such tool")')
    assert pool.step("good", "go") == Reply("#1", done=False)
    pool.end_all()


def left_of(*groups: int) -> list[int]:
    """Return the processes of the groups that are left: a busy machine takes a while to end what was killed."""
    for _ in range(200):
        left = [pid for group in groups for pid in pid_of(group)]
        if not left:
            break
        time.sleep(0.05)
    return left


def pool_goes_on(pool: SessionProcesses, key: str, group: int) -> bool:
    """Return whether anything of a session is left."""
    return key in pool or bool(left_of(group))


def test_a_session_that_hangs_ends_with_the_processes_that_it_has_started(pool):
    pool.reset("bad", problem(), 1)
    group = group_of(pool, "bad")
    assert pool.step("bad", "hang").failure == "step gave no reply within 0.5 s"
    assert not pool_goes_on(pool, "bad", group)


def test_a_session_that_stops_its_parent_costs_no_session_anything(pool):
    pool.reset("bad", problem(), 1)
    assert pool.step("bad", "stop") == Reply("#1", done=False)
    assert pool.reset("good", problem(), 1).text == "fine 1" and pool.step("good", "go").text == "#1"
    pool.end_all()
    assert "bad" not in pool and pool.reset("later", problem(), 1).text == "fine 1"
    pool.end_all()


def test_an_environments_process_that_does_not_answer_is_ended_with_its_sessions(monkeypatch):
    pool = SessionProcesses("sessions.Told", {}, SessionLimits(seconds=0.2))
    pool.reset("a", problem(), 1)
    group, process = group_of(pool, "a"), pool._process
    monkeypatch.setattr(session_processes, "_CLOSE_SECONDS", 0.1)
    stays_stopped = {signal.SIGCONT: signal.SIGSTOP}
    monkeypatch.setattr(process, "send_signal", lambda number: os.kill(process.pid, stays_stopped.get(number, number)))
    with pytest.raises(RuntimeError, match="the process of the environment has ended"):
        pool.reset("b", problem(), 1)
    assert process.returncode == -signal.SIGKILL and not pool._sessions and not left_of(group)
    with pytest.raises(RuntimeError, match="the process of the environment has ended"):
        pool.step("a", "go")


def test_sessions_that_are_left_after_the_end_of_their_environments_process_end_without_an_error():
    pool = SessionProcesses("sessions.Told", {}, SessionLimits())
    pool.reset("a", problem(), 1)
    pool._process.kill()
    pool._process.wait()
    os.kill(group_of(pool, "a"), signal.SIGKILL)
    pool.end_all()
    assert not pool._sessions
    pool.close()


def test_an_environment_that_ignores_the_end_of_processes_has_sessions_with_a_status():
    pool = SessionProcesses("sessions.NeverWaited", {}, SessionLimits())
    pool.reset("a", problem(), 1)
    assert pool.step("a", "go").failure == "the process of the session ended in step: status 3"
    pool.close()


def test_a_session_whose_episode_is_over_is_closed(tmp_path):
    pool = SessionProcesses("sessions.Told", {"directory": str(tmp_path)}, SessionLimits())
    for key in ("done", "left"):
        pool.reset(key, problem(), 1)
        pool.step(key, "go")
    assert pool.step("done", "done").text == "#2" and "done" not in pool
    assert [path.read_text() for path in tmp_path.iterdir()] == ["2"]
    pool.end_all()
    assert sorted(path.read_text() for path in tmp_path.iterdir()) == ["1", "2"]
    pool.close()


def test_threads_play_sessions_at_the_same_time(pool):
    before = set(threading.enumerate())

    def play(number: int) -> list[str | None]:
        pool.reset(number, problem(), number)
        return [pool.step(number, "go").text for _ in range(3)]

    with ThreadPoolExecutor(8) as threads:
        assert list(threads.map(play, range(24))) == [["#1", "#2", "#3"]] * 24
    pool.end_all()
    assert set(threading.enumerate()) <= before


def test_the_environments_process_gets_no_secret_of_the_trainer():
    variables = {"WANDB_API_KEY": "k", "HF_TOKEN": "t", "SELFDISTILL_SERVER_TOKEN": "s", "HOME": "/h"}
    kept = _variables({**variables, "TOKENIZERS_PARALLELISM": "false"})
    assert set(kept) == {"HOME", "TOKENIZERS_PARALLELISM", "PYTHONPATH", "CUDA_VISIBLE_DEVICES"}
    assert "HF_TOKEN" in _variables(variables, keep="HF_TOKEN"), "the one that environment.options.api_key_env names"


KILLED = """
import os, signal, sys
from test_session_processes import *
pool = SessionProcesses("sessions.Told", {}, SessionLimits())
pool.reset("hangs", problem(), 1)
pool.reset("waits", problem(), 1)
print(*(group_of(pool, key) for key in ("hangs", "waits")), pool._process.pid, flush=True)
threading.Thread(target=pool.step, args=("hangs", "hang"), daemon=True).start()
time.sleep(0.3)
os.kill(os.getpid(), signal.SIGKILL)
"""


@pytest.mark.parametrize("before", ["", "pool.step('waits', 'stop')\n"])
def test_every_session_ends_if_its_rank_is_killed_also_where_the_process_between_is_stopped(before):
    paths = os.pathsep.join([str(Path(__file__).parent), *sys.path])
    done = subprocess.run(
        [sys.executable, "-c", KILLED.replace("threading.Thread(", f"{before}threading.Thread(")],
        capture_output=True,
        text=True,
        env={**os.environ, "PYTHONPATH": paths},
    )
    assert done.returncode == -signal.SIGKILL, done.stderr
    groups = list(map(int, done.stdout.split()))
    assert len(groups) == 3
    assert not left_of(*groups)
