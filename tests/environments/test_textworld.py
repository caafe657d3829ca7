# Copyright (c) 2026 the megatron_selfdistill authors. Apache-2.0.
"""Ten games of TextWorld as sessions: played to their ends, and by a run that is killed and resumed."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from killed_episodes import told_by_a_killed_run, write_tokenizer_of_characters

from megatron_selfdistill.data.problems import Problem
from megatron_selfdistill.environments.environment import SessionLimits
from megatron_selfdistill.environments.session_processes import SessionProcesses

GAME = "environments.textworld_games.TextWorldGame"
NUMBER = 10


@pytest.fixture(scope="module")
def games(tmp_path_factory) -> Path:
    from environments.textworld_games import write_games

    directory = tmp_path_factory.mktemp("games")
    write_games(directory, NUMBER)
    write_tokenizer_of_characters(directory)
    return directory


def records(games: Path) -> list[dict[str, str]]:
    return [json.loads(line) for line in (games / "problems.jsonl").read_text().splitlines()]


def test_ten_episodes_are_won_by_their_walkthroughs(games):
    sessions = SessionProcesses(GAME, {"directory": str(games)}, SessionLimits())
    problems = [
        Problem(r["id"], ({"role": "user", "content": r["problem"]},), "", None, r["id"]) for r in records(games)
    ]
    openings = [sessions.reset(problem.id, problem, 0) for problem in problems]
    assert len(openings) == NUMBER and all(one.failure is None and one.text for one in openings)
    for record in records(games):
        replies = [sessions.step(record["id"], command) for command in record["solution"].splitlines()]
        assert sum(reply.reward for reply in replies) == pytest.approx(1)
        assert replies[-1].done and record["id"] not in sessions
    sessions.close()


def test_a_killed_run_plays_its_episodes_again(ranks, games, tmp_path):
    told = told_by_a_killed_run(
        ranks,
        games,
        tmp_path,
        *(f"environment.name={GAME}", f"environment.options.directory={games}", "rollout.max_new_tokens=12"),
        *("data.on_long_context=drop", "model.max_position_embeddings=4096", "schedule.max_tokens=4096"),
    )
    first = [record for record in told if record.get("turn", 0) == 0]
    assert all(record["opening"]["text"] for record in first)
    assert {record["problem_id"] for record in first} == {record["id"] for record in records(games)}
