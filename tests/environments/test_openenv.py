# Copyright (c) 2026 the megatron_selfdistill authors. Apache-2.0.
"""Ten games on a real server of OpenEnv: played to their ends, and by a run that is killed and resumed."""

from __future__ import annotations

import json
import random
import socket
import string
import subprocess
import sys
import time
import zlib
from collections.abc import Iterator
from pathlib import Path

import pytest
from ranks import RankError
from tiny_run import assert_equal_runs, overrides, reproducible_metrics, saved_step, train

from megatron_selfdistill.data.problems import Problem
from megatron_selfdistill.environments import SessionLimits
from megatron_selfdistill.session_processes import SessionProcesses

NAME = "environments.openenv_sessions.OpenEnv"
NUMBER = 10


def digit(identity: str) -> str:
    """Return the digit of the game of a problem."""
    return str(random.Random(zlib.crc32(identity.encode())).randrange(10))


@pytest.fixture(scope="module")
def url() -> Iterator[str]:
    """Start a server and return its address."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    module = Path(__file__).parents[1] / "support" / "openenv_numbers.py"
    server = subprocess.Popen([sys.executable, str(module), str(port)])
    for _ in range(1200):  # the import of openenv takes ten seconds and more
        assert server.poll() is None, "the server has ended"
        with socket.socket() as probe:
            if probe.connect_ex(("127.0.0.1", port)) == 0:
                break
        time.sleep(0.1)
    yield f"http://127.0.0.1:{port}"
    server.kill()
    server.wait()


@pytest.fixture(scope="module")
def games(tmp_path_factory) -> Path:
    """Return a directory with problems and a tokenizer of characters."""
    from _lib.pretraining import write_tokenizer

    directory = tmp_path_factory.mktemp("games")
    records = [{"id": f"game{i}", "problem": "Play.", "solution": digit(f"game{i}")} for i in range(NUMBER)]
    (directory / "problems.jsonl").write_text("".join(f"{json.dumps(record)}\n" for record in records))
    write_tokenizer(directory / "tokenizer", "".join(dict.fromkeys(string.printable[:95] + "\n$_")))
    return directory


def test_ten_episodes_are_sessions_of_the_server(url):
    sessions = SessionProcesses(NAME, {"url": url, "shown": "text"}, SessionLimits())
    for i in range(NUMBER):
        problem = Problem(f"game{i}", ({"role": "user", "content": "Play."},), "", None, "file:1")
        assert sessions.reset(problem.id, problem, seed=i).text == "\n\nGuess a digit."
    for i in range(NUMBER):  # all sessions are open at the same time
        key, right = f"game{i}", digit(f"game{i}")
        wrong = sessions.step(key, "no digit")
        assert (wrong.text, wrong.reward, wrong.done) == ("wrong", 0, False)
        reply = sessions.step(key, right)
        assert (reply.text, reply.reward, reply.done) == ("right", 1, True) and key not in sessions
    sessions.close()


def test_without_a_field_the_model_reads_all_fields(url):
    sessions = SessionProcesses(NAME, {"url": url}, SessionLimits())
    problem = Problem("game0", ({"role": "user", "content": "Play."},), "", None, "file:1")
    assert json.loads(sessions.reset("a", problem, 0).text or "") == {"text": "Guess a digit."}
    sessions.close()


def arguments(games: Path, run_dir: Path, url: str) -> list[str]:
    """Return the arguments of six steps of five games, each played twice."""
    return [
        *overrides(games, run_dir, "data.global_batch_size=5", "rollout.num_samples=2", "rollout.max_new_tokens=2"),
        *("num_steps=6", "checkpoint.save_every=2", "optimizer.lr_warmup_steps=0", "method.name=opsd_rl"),
        *("data.teacher_template='{problem}\\n{solution}\\n'", "environment.max_turns=3"),
        *(f"environment.name={NAME}", f"environment.options.url={url}", "environment.options.shown=text"),
    ]


def test_a_killed_run_plays_its_episodes_again(ranks, games, url, tmp_path):
    whole = tmp_path / "whole"
    train(ranks, [*arguments(games, whole, url), f"rollout.record={whole}/responses.jsonl"])
    told = [json.loads(line) for line in (whole / "responses.jsonl").read_text().splitlines()]
    assert sum(record.get("turn", 0) == 0 for record in told) == 6 * 5 * 2
    assert all(step["episodes/failed_share"] == 0 for step in reproducible_metrics(whole))
    assert any(record.get("turn", 0) > 0 for record in told)
    with pytest.raises(RankError, match="ended with exit code -9"):
        train(ranks, arguments(games, tmp_path / "killed", url), kill_at="step")
    assert saved_step(tmp_path / "killed") == 4
    train(ranks, arguments(games, tmp_path / "killed", url))
    assert_equal_runs(ranks, whole, tmp_path / "killed")
