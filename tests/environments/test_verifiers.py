# Copyright (c) 2026 the megatron_selfdistill authors. Apache-2.0.
"""Ten rollouts of verifiers as sessions: played to their ends, and by a run that is killed and resumed."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from killed_episodes import told_by_a_killed_run, write_tokenizer_of_characters

from megatron_selfdistill.data.problems import Problem
from megatron_selfdistill.environments.environment import SessionLimits
from megatron_selfdistill.environments.session_processes import SessionProcesses

NAME = "environments.verifiers_sessions.Verifiers"
NUMBER = 10


@pytest.fixture(scope="module")
def games(tmp_path_factory) -> Path:
    from environments.verifiers_sessions import write_problems

    directory = tmp_path_factory.mktemp("games")
    write_problems(directory / "problems.jsonl", "verifiers_numbers")
    write_tokenizer_of_characters(directory)
    return directory


def test_ten_episodes_are_rollouts_that_the_rubric_rewards(games):
    sessions = SessionProcesses(NAME, {"name": "verifiers_numbers"}, SessionLimits())
    records = [json.loads(line) for line in (games / "problems.jsonl").read_text().splitlines()]
    assert len(records) == NUMBER
    for record in records:
        problem = Problem(record["id"], tuple(record["messages"]), "", record["answer"], "file:1")
        opening = sessions.reset(problem.id, problem, 0)
        assert opening.text is None and opening.failure is None
    for record in records:  # all rollouts are open at the same time
        wrong = sessions.step(record["id"], "no digit")
        assert (wrong.text, wrong.reward, wrong.done) == ("wrong", 0, False)
        right = sessions.step(record["id"], record["answer"])
        assert (right.text, right.reward, right.done) == (None, 1, True) and record["id"] not in sessions
    sessions.close()


def test_a_killed_run_plays_its_episodes_again(ranks, games, tmp_path):
    options = [f"environment.name={NAME}", "environment.options.name=verifiers_numbers"]
    told_by_a_killed_run(ranks, games, tmp_path, *options, "rollout.max_new_tokens=2")
