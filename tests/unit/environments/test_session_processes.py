# Copyright (c) 2026 the megatron_selfdistill authors. Apache-2.0.
"""Sessions in processes: state, failures by name, limits, and that nothing outlives its rank."""

from __future__ import annotations

import contextlib
import os
import signal
import subprocess
import sys
import threading
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
from events import wait_until
from sessions import pid_of

from megatron_selfdistill.data.episode_reply import Reply
from megatron_selfdistill.data.problems import Problem
from megatron_selfdistill.environments import session_processes
from megatron_selfdistill.environments.environment import SessionLimits
from megatron_selfdistill.environments.session_processes import SessionProcesses, _variables

PROBLEM = Problem("p", ({"role": "user", "content": "3 - 4"},), "hint", "fine", "file:7")


@pytest.fixture(scope="module")
def pool() -> Iterator[SessionProcesses]:
    """Return sessions of `sessions.Told` with 0.3 GB of memory."""
    yield from made("sessions.Told", memory_gb=0.3)


def made(name: str, options: dict[str, str] | None = None, **limits: float) -> Iterator[SessionProcesses]:
    """Yield sessions which may take as long as the machine needs; close them at the end."""
    with contextlib.closing(SessionProcesses(name, options or {}, SessionLimits(seconds=3600, **limits))) as pool:
        yield pool


patient = contextlib.contextmanager(made)


def group_of(pool: SessionProcesses, key: str) -> int:
    return pool._sessions[key][1]


def test_each_session_has_a_state_of_its_own_and_the_seed_of_its_sample(pool):
    assert [pool.reset(key, PROBLEM, seed).text for key, seed in (("a", 1), ("b", 2))] == ["fine 1", "fine 2"]
    replies = [pool.step(key, "go").text for key in "aabab"]
    assert replies == ["#1", "#2", "#1", "#3", "#2"]
    groups = [group_of(pool, key) for key in "ab"]
    assert os.getpgrp() not in groups and len(set(groups)) == 2
    pool.end_all()
    assert "a" not in pool and all_ended(*groups)


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
        pool.reset(key, PROBLEM, 1)
    group = group_of(pool, "bad")
    failure = pool.step("bad", word).failure or ""
    assert failure.partition("\n")[0] == reason and "bad" not in pool and all_ended(group)
    assert word != "raise" or failure.endswith('    raise KeyError("no such tool")')
    assert pool.step("good", "go") == Reply("#1", done=False)
    pool.end_all()


def all_ended(*groups: int) -> bool:
    """Wait until no process of the groups is left: a busy machine takes a while to end what was killed."""
    return wait_until(lambda: not any(map(pid_of, groups)))


def test_a_session_that_hangs_ends_with_the_processes_that_it_has_started(pool, monkeypatch):
    pool.reset("bad", PROBLEM, 1)
    group = group_of(pool, "bad")
    monkeypatch.setattr(pool, "_limits", SessionLimits(seconds=0.5))
    assert pool.step("bad", "hang").failure == "step gave no reply within 0.5 s"
    assert "bad" not in pool and all_ended(group)


def test_a_session_that_stops_its_parent_costs_no_session_anything(pool):
    pool.reset("bad", PROBLEM, 1)
    assert pool.step("bad", "stop") == Reply("#1", done=False)
    assert pool.reset("good", PROBLEM, 1).text == "fine 1" and pool.step("good", "go").text == "#1"
    pool.end_all()
    assert "bad" not in pool and pool.reset("later", PROBLEM, 1).text == "fine 1"
    pool.end_all()


def test_an_environments_process_that_does_not_answer_is_ended_with_its_sessions(monkeypatch):
    with patient("sessions.Told") as pool:
        pool.reset("a", PROBLEM, 1)
        group, process = group_of(pool, "a"), pool._process
        pool._control.settimeout(0.2)
        monkeypatch.setattr(session_processes, "_CLOSE_SECONDS", 0.1)
        stays_stopped = {signal.SIGCONT: signal.SIGSTOP}
        monkeypatch.setattr(process, "send_signal", lambda sent: os.kill(process.pid, stays_stopped.get(sent, sent)))
        for call in (lambda: pool.reset("b", PROBLEM, 1), lambda: pool.step("a", "go")):
            with pytest.raises(RuntimeError, match="the process of the environment has ended"):
                call()
        assert process.returncode == -signal.SIGKILL and not pool._sessions and all_ended(group)


def test_sessions_that_are_left_after_the_end_of_their_environments_process_end_without_an_error():
    with patient("sessions.Told") as pool:
        pool.reset("a", PROBLEM, 1)
        pool._process.kill()
        pool._process.wait()
        os.kill(group_of(pool, "a"), signal.SIGKILL)
        pool.end_all()
        assert not pool._sessions


def test_an_environment_that_ignores_the_end_of_processes_has_sessions_with_a_status():
    with patient("sessions.NeverWaited") as pool:
        pool.reset("a", PROBLEM, 1)
        assert pool.step("a", "go").failure == "the process of the session ended in step: status 3"


def test_a_session_whose_episode_is_over_is_closed(tmp_path, monkeypatch):
    monkeypatch.setattr(session_processes, "_CLOSE_SECONDS", 3600.0)
    with patient("sessions.Told", {"directory": str(tmp_path)}) as pool:
        for key in ("done", "left"):
            pool.reset(key, PROBLEM, 1)
            pool.step(key, "go")
        assert pool.step("done", "done").text == "#2" and "done" not in pool
        assert [path.read_text() for path in tmp_path.iterdir()] == ["2"]
        pool.end_all()
        assert sorted(path.read_text() for path in tmp_path.iterdir()) == ["1", "2"]


def test_threads_play_sessions_at_the_same_time(pool):
    before = set(threading.enumerate())

    def play(number: int) -> list[str | None]:
        pool.reset(number, PROBLEM, number)
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
import os, signal, threading
from test_session_processes import *
pool = SessionProcesses("sessions.Told", {}, SessionLimits())
for key in ("hangs", "waits"):
    pool.reset(key, PROBLEM, 1)
hangs, waits = (group_of(pool, key) for key in ("hangs", "waits"))
print(hangs, waits, pool._process.pid, flush=True)
BEFORE
threading.Thread(target=pool.step, args=("hangs", "hang"), daemon=True).start()
wait_until(lambda: len(pid_of(hangs)) == 2)  # it has started a process
os.kill(os.getpid(), signal.SIGKILL)
"""


@pytest.mark.parametrize("before", ["", "pool.step('waits', 'stop')"])
def test_every_session_ends_if_its_rank_is_killed_also_where_the_process_between_is_stopped(before):
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join([str(Path(__file__).parent), *sys.path])}
    command = [sys.executable, "-c", KILLED.replace("BEFORE", before)]
    done = subprocess.run(command, capture_output=True, text=True, env=environment)
    assert done.returncode == -signal.SIGKILL, done.stderr
    groups = list(map(int, done.stdout.split()))
    assert len(groups) == 3 and all_ended(*groups)
