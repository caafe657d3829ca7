# Copyright (c) 2026 the megatron_selfdistill authors. Apache-2.0.
"""Ten games of TextWorld as sessions: played to their ends, and by a run that is killed and resumed."""

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

GAME = "environments.textworld_games.TextWorldGame"
NUMBER = 10


@pytest.fixture(scope="module")
def games(tmp_path_factory) -> Path:
    """Return a directory with games, their problems and a tokenizer of characters."""
    from environments.textworld_games import write_games

    from _lib.pretraining import write_tokenizer

    directory = tmp_path_factory.mktemp("games")
    write_games(directory, NUMBER)
    write_tokenizer(directory / "tokenizer", "".join(dict.fromkeys(string.printable[:95] + "\n$_")))
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


def arguments(games: Path, run_dir: Path) -> list[str]:
    """Return the arguments of six steps of five games each."""
    tiny = overrides(games, run_dir, "data.global_batch_size=5", "rollout.num_samples=2", "rollout.max_new_tokens=12")
    tiny += ["data.on_long_context=drop", "num_steps=6", "checkpoint.save_every=2", "optimizer.lr_warmup_steps=0"]
    tiny += ["data.teacher_template='{problem}\\n{solution}\\n'"]
    tiny += ["model.max_position_embeddings=4096", "schedule.max_tokens=4096"]
    return [
        *tiny,
        "method.name=opsd_rl",
        f"environment.name={GAME}",
        f"environment.options.directory={games}",
        "environment.max_turns=3",
    ]


def test_a_killed_run_plays_its_episodes_again(ranks, games, tmp_path):
    whole = tmp_path / "whole"
    train(ranks, [*arguments(games, whole), f"rollout.record={whole}/responses.jsonl"])
    told = [json.loads(line) for line in (whole / "responses.jsonl").read_text().splitlines()]
    first = [record for record in told if record.get("turn", 0) == 0]
    assert len(first) == 6 * 5 * 2 and all(record["opening"]["text"] for record in first)
    assert {record["problem_id"] for record in first} == {record["id"] for record in records(games)}
    assert all(step["episodes/failed_share"] == 0 for step in reproducible_metrics(whole))
    assert any(record.get("turn", 0) > 0 for record in told)
    with pytest.raises(RankError, match="ended with exit code -9"):
        train(ranks, arguments(games, tmp_path / "killed"), kill_at="step")
    assert saved_step(tmp_path / "killed") == 4
    train(ranks, arguments(games, tmp_path / "killed"))
    assert_equal_runs(ranks, whole, tmp_path / "killed")
