# Copyright (c) 2026 the megatron_selfdistill authors. Apache-2.0.
"""Own solutions: the table of a run, and which of its solutions the teacher sees; no response is its own solution."""

from __future__ import annotations

import json
from dataclasses import replace
from typing import Any

import pytest
import tiny
import tiny_run
from made_methods import made, response_of, shown
from sums import sums

from megatron_selfdistill.config import from_mapping
from megatron_selfdistill.data.run_data import RunData
from megatron_selfdistill.evaluation.verify import exact_match
from megatron_selfdistill.methods.own_solutions import OwnSolutionHints, Solution

GIVEN = tiny.given()
TOOLS = {"builder": GIVEN.builder, "verifier": exact_match}
OTHER = tiny.problem("2+7", "given", "9", id="q")


def new_method(*overrides: str, **tools: Any) -> OwnSolutionHints:
    keys = ["rollout.num_samples=2", "seed=5", "data.global_batch_size=8", "method.num_samples=4"]
    return made(["method.name=own_solutions", *keys, "method.refresh_every=10", *overrides], GIVEN, **tools)


@pytest.mark.parametrize("weight", [0, 1])
def test_an_own_solution_takes_the_place_of_the_given_one_but_never_of_itself(one_rank, weight):
    """Rollouts without an own solution stay for their rewards where these count."""
    table = {"p": [Solution(text, len(text), 0) for text in ("so 8", "8")]}
    method: Any = replace(new_method(f"method.weight={weight}"), table=table, refreshed_at=0)
    rollouts = [tiny.rollout(text, prompts=method) for text in ("so 8$", "7$")]
    rollouts.append(tiny.rollout("9$", 0.0, 1, prompts=method, problem=OTHER))
    assert "so 8" in shown(rollouts[0]) and "given" not in shown(rollouts[0])
    assert method.has_solution(rollouts[0].problem) and not method.has_solution(OTHER)
    chosen, metrics = method.select(0, rollouts)
    assert [one.hinted for one in chosen] == [True, True, False][: 2 + weight]
    assert [(one.problem.solution, one.response) for one in chosen[:2]] == [
        *(("8", rollouts[0].response), ("so 8", rollouts[1].response))
    ]
    assert all(one.problem.solution in shown(one) for one in chosen[:2])
    assert all(one.prompts.teacher_prompt == one.prompts.student_prompt for one in chosen[2:])
    assert metrics == {"solutions/skipped_share": pytest.approx(1 / 3)}


def own_solutions(*found: tuple[int, list[str]], keep: int = 2) -> OwnSolutionHints:
    """Return the method after searches that found these texts, at these steps, for one problem."""
    method = new_method(f"method.keep={keep}")
    for step, texts in found:
        replies = [response_of(f"{text}$") for text in texts] + [response_of("wrong$")] * (4 - len(texts))
        method, _ = method.refreshed(step, sums(1), generate=lambda requests, replies=replies: replies, **TOOLS)
    return method


def kept(method: OwnSolutionHints) -> list[tuple[str, int]]:
    return [(solution["text"], solution["step"]) for solution in method.state_dict()["own"]["table"]["p0"]]


def test_no_response_is_its_own_hint_or_its_hint_but_for_form():
    table, alone = own_solutions((0, ["so\n8", "It is\n8"])), own_solutions((0, ["so\n8"]))
    for response in ("so\n8", "so  8", "So \n\n8.", "s\u200bo\n8\n"):
        assert table.solution_for("p0", response).text == "It is\n8"
        assert alone.solution_for("p0", response) is None
    for response in ("", "7"):
        assert table.solution_for("p0", response).text == alone.solution_for("p0", response).text == "so\n8"
    assert alone.solution_for("unknown") is own_solutions((0, [])).solution_for("p0") is None


@pytest.mark.parametrize(
    ("found", "keep", "expected"),
    [
        ([(0, ["8", "so\n8"]), (10, ["well\n8"])], 2, [("well\n8", 10), ("8", 0)]),  # old ones fill up
        ([(0, ["8", "so\n8"]), (10, ["well\n8", "8", "hence\n8"])], 2, [("8", 10), ("well\n8", 10)]),
        ([(0, ["8"]), (10, [])], 2, [("8", 0)]),
        ([(0, ["so\n8", "So  \n8", "so\n\n8", "hence\n8"])], 2, [("so\n8", 0), ("hence\n8", 0)]),  # twins are one
        ([(0, ["so\n8"]), (10, ["SO\n8"])], 3, [("SO\n8", 10)]),
    ],
)
def test_new_solutions_come_first_and_twins_take_one_place(found, keep, expected):
    assert kept(own_solutions(*found, keep=keep)) == expected


def test_a_search_is_due_every_so_many_steps_and_a_table_that_was_saved_and_loaded_goes_on_alike():
    table, empty = own_solutions((10, ["8", "so\n8"]), (20, ["well\n8"])), new_method()
    other = empty.restored(json.loads(json.dumps(table.state_dict())))
    assert empty.table == {} and empty.due(0) and empty.due(7), "restoring makes another method"
    assert other.state_dict() == table.state_dict()
    assert other.solution_for("p0", "well\n8") == table.solution_for("p0", "well\n8")
    for method in (table, other):
        assert [step for step in range(20, 42) if method.due(step)] == list(range(30, 42))


def test_metrics_say_what_was_found_and_what_there_is():
    replies = list(map(response_of, ["8$", "so\n8$", "9$", "9", *["7$"] * 4]))
    table, metrics = new_method().refreshed(0, sums(2), generate=lambda requests: replies, **TOOLS)
    wanted = {"problems": 2, "pass_rate": 0.25, "solved_share": 0.5, "available_share": 0.5, "length_mean": 3.5}
    assert metrics == {f"solutions/{name}": value for name, value in wanted.items()}
    table, metrics = table.refreshed(10, sums(2), generate=lambda requests: [response_of("7$")] * 8, **TOOLS)
    assert metrics["solutions/solved_share"] == 0 and metrics["solutions/available_share"] == 0.5


def test_with_own_solutions_the_datas_are_neither_needed_nor_read(tmp_path):
    tiny_run.write_data(tmp_path, 4)
    records = [json.loads(line) for line in (tmp_path / "problems.jsonl").read_text().splitlines()]
    bare = [{key: value for key, value in record.items() if key != "solution"} for record in records]
    (tmp_path / "bare.jsonl").write_text("".join(json.dumps(record) + "\n" for record in bare))
    for name in ("problems.jsonl", "bare.jsonl"):
        data = {"tokenizer": f"{tmp_path}/tokenizer", "path": str(tmp_path / name)}
        settings = {"method": {"name": "own_solutions"}, "data": data, "rollout": {"max_new_tokens": 14}}
        read = RunData.load(from_mapping(settings)).problems.problems
        assert [(p.solution, p.answer) for p in read] == [("", record["answer"]) for record in records]
