# Copyright (c) 2026 the megatron_selfdistill authors. Apache-2.0.
"""Ten games on a real server of OpenEnv: played to their ends, and by a run that is killed and resumed."""

from __future__ import annotations

import json
import random
import sys
import zlib
from collections.abc import Iterator
from pathlib import Path

import pytest
from game_servers import serving
from killed_episodes import told_by_a_killed_run, write_tokenizer_of_characters

from megatron_selfdistill.data.problems import Problem
from megatron_selfdistill.environments.environment import SessionLimits
from megatron_selfdistill.environments.session_processes import SessionProcesses

NAME = "environments.openenv_sessions.OpenEnv"
NUMBER = 10


def digit(identity: str) -> str:
    return str(random.Random(zlib.crc32(identity.encode())).randrange(10))


@pytest.fixture(scope="module")
def url() -> Iterator[str]:
    with serving(sys.executable, "openenv_numbers") as address:
        yield address


@pytest.fixture(scope="module")
def games(tmp_path_factory) -> Path:
    directory = tmp_path_factory.mktemp("games")
    records = [{"id": f"game{i}", "problem": "Play.", "solution": digit(f"game{i}")} for i in range(NUMBER)]
    (directory / "problems.jsonl").write_text("".join(f"{json.dumps(record)}\n" for record in records))
    write_tokenizer_of_characters(directory)
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


def test_a_killed_run_plays_its_episodes_again(ranks, games, url, tmp_path):
    options = [f"environment.name={NAME}", f"environment.options.url={url}", "environment.options.shown=text"]
    told_by_a_killed_run(ranks, games, tmp_path, *options, "rollout.max_new_tokens=2")
