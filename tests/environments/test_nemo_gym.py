# Copyright (c) 2026 the megatron_selfdistill authors. Apache-2.0.
"""Ten games on a real resources server of NeMo Gym: played to their ends, and by a run that is killed and resumed."""

from __future__ import annotations

import json
import os
from collections.abc import Iterator
from pathlib import Path

import pytest
from game_servers import serving
from killed_episodes import told_by_a_killed_run, write_tokenizer_of_characters

from megatron_selfdistill.data.problems import Problem, load_problems
from megatron_selfdistill.data.records import RecordSource
from megatron_selfdistill.environments.environment import SessionLimits
from megatron_selfdistill.environments.session_processes import SessionProcesses

PYTHON = Path(os.environ.get("SELFDISTILL_NEMO_GYM_PYTHON", "missing"))
pytestmark = pytest.mark.skipif(
    not PYTHON.exists(),
    reason="NeMo Gym needs Python 3.12, which is not installed here: install it and run make test-environments again",
)

NAME = "environments.nemo_gym_sessions.NemoGym"
NUMBER = 10
PARAMETERS = {"type": "object", "properties": {"digit": {"type": "integer"}}, "required": ["digit"]}
TOOL = {"type": "function", "name": "guess", "description": "", "parameters": PARAMETERS, "strict": True}


@pytest.fixture(scope="module")
def url() -> Iterator[str]:
    with serving(PYTHON, "nemo_gym_numbers") as address:
        yield address


@pytest.fixture(scope="module")
def games(tmp_path_factory) -> Path:
    directory = tmp_path_factory.mktemp("games")
    asked = [{"role": "developer", "content": "Play."}, {"role": "user", "content": "Guess."}]
    rows = [{"responses_create_params": {"input": asked, "tools": [TOOL]}, "digit": i} for i in range(NUMBER)]
    (directory / "rows.jsonl").write_text("".join(f"{json.dumps(row)}\n" for row in rows))
    problems = [{"id": str(i), "problem": "Guess.", "solution": str(i)} for i in range(NUMBER)]
    (directory / "problems.jsonl").write_text("".join(f"{json.dumps(problem)}\n" for problem in problems))
    write_tokenizer_of_characters(directory)
    return directory


def problems_of(rows: Path, directory: Path, *field: str) -> list[Problem]:
    from environments.nemo_gym_sessions import write_problems

    write_problems(directory / "written.jsonl", rows, *field)
    source = RecordSource(directory / "written.jsonl", "train", None, {}, "error", None, "data")
    return load_problems(source, require_solution=bool(field)).problems


def call(name: str, **arguments: int) -> str:
    return f"<tool_call>{json.dumps({'name': name, 'arguments': arguments})}</tool_call>"


def test_ten_episodes_are_sessions_of_the_server(url, games, tmp_path):
    sessions = SessionProcesses(NAME, {"url": url, "data": str(games / "rows.jsonl")}, SessionLimits())
    problems = problems_of(games / "rows.jsonl", tmp_path)
    for problem in problems:
        opening = sessions.reset(problem.id, problem, seed=0)
        assert opening.text is None and opening.failure is None
    for problem in problems:  # all sessions are open at the same time
        key, digit = problem.id, int(problem.id)
        wrong = sessions.step(key, f"<think>{call('guess', digit=digit)}</think>{call('guess', digit=digit + 1)}")
        assert (wrong.text, wrong.role, wrong.reward, wrong.done) == ('{"told":"wrong"}', "tool", 0, False)
        both = sessions.step(key, call("guess", digit=digit) + call("guess", digit=digit - 1))
        assert both.text == '{"told":"right"}\n{"told":"wrong"}'
        reply = sessions.step(key, f"<think>So?</think>\n{digit}")
        assert (reply.failure, reply.reward, reply.done) == (None, 1 / 4, True) and key not in sessions
    sessions.close()


def test_a_bad_call_is_an_answer_and_no_request(url, games, tmp_path):
    sessions = SessionProcesses(NAME, {"url": url, "data": str(games / "rows.jsonl")}, SessionLimits())
    problem = problems_of(games / "rows.jsonl", tmp_path)[3]
    sessions.reset("a", problem, seed=0)
    unreadable = sessions.step("a", "<tool_call>guess</tool_call>")
    assert unreadable.role == "tool" and (unreadable.text or "").startswith("Error: expected")
    for name in ("verify", "../verify"):
        assert sessions.step("a", call(name)).text == f"Error: there is no tool {name!r}: the tools are guess"
    refused = sessions.step("a", call("guess", number=3))  # the server says which argument it misses
    assert '"missing"' in (refused.text or "") and not refused.done
    assert sessions.step("a", "3").reward == 1
    sessions.close()


def test_a_killed_run_plays_its_episodes_again(ranks, games, url, tmp_path):
    given = {"url": url, "data": games / "rows.jsonl", "parser": "guessed_calls.guessed"}
    options = [f"environment.name={NAME}", *(f"environment.options.{key}={value}" for key, value in given.items())]
    stops = f"rollout.stop_token_ids={list(range(48, 96))}"  # half of the characters: most responses end by themselves
    told = told_by_a_killed_run(ranks, games, tmp_path, *options, stops, "rollout.max_new_tokens=4")
    assert '{"told":"wrong"}' in {(record.get("reply") or {}).get("text") for record in told}
