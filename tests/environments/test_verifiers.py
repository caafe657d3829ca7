# Copyright (c) 2026 the megatron_selfdistill authors. Apache-2.0.
"""Ten rollouts of verifiers as sessions: played to their ends, and by a run that is killed and resumed."""

from __future__ import annotations

import json
import string
from pathlib import Path

import pytest
from ranks import RankError
from tiny_run import assert_equal_runs, overrides, reproducible_metrics, saved_step, train

from megatron_selfdistill.data.problems import Problem
from megatron_selfdistill.environments import SessionLimits
from megatron_selfdistill.session_processes import SessionProcesses

NAME = "environments.verifiers_sessions.Verifiers"
NUMBER = 10


@pytest.fixture(scope="module")
def games(tmp_path_factory) -> Path:
    """Return a directory with the problems of `verifiers_numbers` and a tokenizer of characters."""
    from environments.verifiers_sessions import write_problems

    from _lib.pretraining import write_tokenizer

    directory = tmp_path_factory.mktemp("games")
    write_problems(directory / "problems.jsonl", "verifiers_numbers")
    write_tokenizer(directory / "tokenizer", "".join(dict.fromkeys(string.printable[:95] + "\n$_")))
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


def test_the_environments_own_limit_of_turns_ends_an_episode(games):
    sessions = SessionProcesses(NAME, {"name": "verifiers_numbers"}, SessionLimits())
    problem = Problem("3", ({"role": "user", "content": "Guess a digit, game 3."},), "", "3", "file:1")
    sessions.reset("a", problem, 0)
    replies = [sessions.step("a", "no digit") for _ in range(3)]
    assert [(reply.done, reply.reward) for reply in replies] == [(False, 0), (False, 0), (True, 0)]
    sessions.close()


def arguments(games: Path, run_dir: Path) -> list[str]:
    """Return the arguments of six steps of five games, each played twice."""
    return [
        *overrides(games, run_dir, "data.global_batch_size=5", "rollout.num_samples=2", "rollout.max_new_tokens=2"),
        *("num_steps=6", "checkpoint.save_every=2", "optimizer.lr_warmup_steps=0", "method.name=opsd_rl"),
        *("data.teacher_template='{problem}\\n{solution}\\n'", "environment.max_turns=3"),
        *(f"environment.name={NAME}", "environment.options.name=verifiers_numbers"),
    ]


def test_a_killed_run_plays_its_episodes_again(ranks, games, tmp_path):
    whole = tmp_path / "whole"
    train(ranks, [*arguments(games, whole), f"rollout.record={whole}/responses.jsonl"])
    told = [json.loads(line) for line in (whole / "responses.jsonl").read_text().splitlines()]
    assert sum(record.get("turn", 0) == 0 for record in told) == 6 * 5 * 2
    assert all(step["episodes/failed_share"] == 0 for step in reproducible_metrics(whole))
    assert any(record.get("turn", 0) > 0 for record in told)
    with pytest.raises(RankError, match="ended with exit code -9"):
        train(ranks, arguments(games, tmp_path / "killed"), kill_at="step")
    assert saved_step(tmp_path / "killed") == 4
    train(ranks, arguments(games, tmp_path / "killed"))
    assert_equal_runs(ranks, whole, tmp_path / "killed")
