# Copyright (c) 2026 the megatron_selfdistill authors. Apache-2.0.
"""Own solutions: the table of a run, and which of its solutions the teacher sees; no response is its own solution."""

from __future__ import annotations

import json
import random
from dataclasses import replace
from typing import Any

import pytest
from characters import Characters
from made_methods import given_with, made, response_of, shown
from record_sources import load_problems
from sums import answered, sums

from megatron_selfdistill.config import from_mapping
from megatron_selfdistill.data.problems import Problem
from megatron_selfdistill.data.run_data import RunData
from megatron_selfdistill.evaluation.verify import exact_match
from megatron_selfdistill.methods.own_solutions import OwnSolutionHints, Solution
from megatron_selfdistill.sources.rollouts import Rollout

BUILDER = given_with(Characters()).builder
CP2 = pytest.param({"context_parallel_size": 2}, marks=pytest.mark.full)

PROBLEM = Problem("p", ({"role": "user", "content": "1+7"},), "given", "8", "file.jsonl:1")
OTHER = Problem("q", ({"role": "user", "content": "2+7"},), "given", "9", "file.jsonl:2")
GIVEN = given_with(Characters(), max_length=40)


def method_with(*overrides: str, **table: list[str]) -> Any:
    """Return the method with these solutions, found at step 0."""
    solutions = {name: [Solution(text, len(text), 0) for text in texts] for name, texts in table.items()}
    return replace(new_method(*overrides), table=solutions, refreshed_at=0)


def new_method(*overrides: str, **tools: Any) -> OwnSolutionHints:
    """Return the method before its first search."""
    keys = ["rollout.num_samples=2", "seed=5", "data.global_batch_size=8", "method.num_samples=4"]
    return made(["method.name=own_solutions", *keys, "method.refresh_every=10", *overrides], GIVEN, **tools)


def rollout(method: Any, problem: Problem, text: str) -> Rollout:
    return Rollout(problem, method.prompts(problem), response_of(text))


def test_an_own_solution_takes_the_place_of_the_given_one_but_never_of_itself(one_rank):
    method = method_with(p=["so 8", "8"])
    rollouts = [rollout(method, PROBLEM, "so 8$"), rollout(method, PROBLEM, "7$"), rollout(method, OTHER, "9$")]
    assert "so 8" in shown(rollouts[0]) and "given" not in shown(rollouts[0])
    assert method.has_solution(PROBLEM) and not method.has_solution(OTHER)
    chosen, metrics = method.select(0, rollouts)
    assert [(one.problem.solution, one.response) for one in chosen] == [
        ("8", rollouts[0].response),
        ("so 8", rollouts[1].response),
    ]
    assert all(one.problem.solution in shown(one) for one in chosen)
    assert metrics == {"solutions/skipped_share": pytest.approx(1 / 3)}


def test_rollouts_without_an_own_solution_stay_for_their_rewards_where_these_count(one_rank):
    method = method_with("method.weight=1", p=["so 8"])
    rollouts = [replace(rollout(method, OTHER, "9$"), group=1), rollout(method, PROBLEM, "7$")]
    chosen, metrics = method.select(0, rollouts)
    assert [(one.group, one.hinted) for one in chosen] == [(1, False), (0, True)]
    assert chosen[0].prompts.teacher_prompt == chosen[0].prompts.student_prompt and "so 8" in shown(chosen[1])
    assert metrics == {"solutions/skipped_share": 0.5}


def table_in_layout(sizes: dict[str, int], pick: str, count: int = 9) -> tuple[dict, dict[str, float], int]:
    """(state, metrics, calls of the score); scores are made up, from the texts."""
    from megatron_selfdistill.config import ParallelConfig
    from megatron_selfdistill.distributed import ranks

    grid = ranks.initialize(ParallelConfig(**sizes), 0)
    calls = []

    def score(those: Any) -> list[float]:
        calls.append(those)
        return [random.Random(str(response.log_probs)).random() for _, response in those]

    keys = [f"method.pick={pick}", "method.num_samples=6", "data.global_batch_size=4"]
    method, metrics = new_method(*keys, grid=grid).refreshed(
        4,
        sums(count),
        generate=lambda requests: [answered(request) for request in requests],
        builder=BUILDER,
        verifier=exact_match,
        score=score,
    )
    return method.state_dict()["own"], metrics, len(calls)


@pytest.mark.parametrize("sizes", [{}, {"tensor_model_parallel_size": 2}, CP2])
@pytest.mark.parametrize("pick", ["learnable", pytest.param("shortest", marks=pytest.mark.full)])
def test_every_layout_finds_the_same_solutions(ranks, sizes, pick):
    alone = ranks.run(table_in_layout, {}, pick, world_size=1)[0]
    assert sum(bool(kept) for kept in alone[0]["table"].values()) > 5
    # 5 problems: in the last group of one, the second replica has none, and scores all the same
    assert ranks.run(table_in_layout, sizes, pick, world_size=2) == [alone] * 2
    few = ranks.run(table_in_layout, {}, pick, 5, world_size=2)
    assert few[0] == few[1] and few[0][2] == (2 if pick == "learnable" else 0)


def own_solutions(*found: tuple[int, list[str]], keep: int = 2) -> OwnSolutionHints:
    """Return the method after searches that found these texts, at these steps, for one problem."""
    method = new_method(f"method.keep={keep}")
    for step, texts in found:
        replies = [response_of(f"{text}$") for text in texts] + [response_of("wrong$")] * (4 - len(texts))
        tools = {"generate": lambda requests, replies=replies: replies, "builder": BUILDER, "verifier": exact_match}
        method, _ = method.refreshed(step, sums(1), **tools)
    return method


def test_no_response_is_its_own_hint():
    table = own_solutions((0, ["8", "so\n8"]))
    assert table.solution_for("p0").text == "8"
    assert table.solution_for("p0", "7").text == "8"
    assert table.solution_for("p0", "8").text == table.solution_for("p0", " 8\n").text == "so\n8"
    alone = own_solutions((0, ["8"]))
    assert alone.solution_for("p0", "8") is None and alone.solution_for("p0", "9").text == "8"
    assert alone.solution_for("unknown") is None
    assert own_solutions((0, [])).solution_for("p0") is None


def test_a_response_that_is_its_hint_but_for_form_gets_another_hint_or_none():
    table = own_solutions((0, ["so\n8", "It is\n8"]))
    for response in ("so\n8", "so  8", "So \n\n8.", "s\u200bo\n8\n"):
        assert table.solution_for("p0", response).text == "It is\n8"
        assert own_solutions((0, ["so\n8"])).solution_for("p0", response) is None
    assert table.solution_for("p0", "").text == "so\n8"


def test_twins_take_one_place_among_the_solutions_that_are_kept():
    texts = ["so\n8", "So  \n8", "so\n\n8", "hence\n8"]
    assert [s["text"] for s in own_solutions((0, texts)).state_dict()["own"]["table"]["p0"]] == ["so\n8", "hence\n8"]
    table = own_solutions((0, ["so\n8"]), (10, ["SO\n8"]), keep=3)
    assert [(s["text"], s["step"]) for s in table.state_dict()["own"]["table"]["p0"]] == [("SO\n8", 10)]


def test_new_solutions_come_first_and_old_ones_fill_up():
    table = own_solutions((0, ["8", "so\n8"]), (10, ["well\n8"]))
    assert [(s["text"], s["step"]) for s in table.state_dict()["own"]["table"]["p0"]] == [("well\n8", 10), ("8", 0)]
    table = own_solutions((0, ["8", "so\n8"]), (10, ["well\n8", "8", "hence\n8"]))
    assert [(s["text"], s["step"]) for s in table.state_dict()["own"]["table"]["p0"]] == [("8", 10), ("well\n8", 10)]
    assert own_solutions((0, ["8"]), (10, [])).solution_for("p0").step == 0


def test_a_search_is_due_at_the_start_and_every_so_many_steps():
    table = new_method()
    assert table.due(0) and table.due(7)
    table = own_solutions((20, ["8"]))
    assert [step for step in range(20, 42) if table.due(step)] == list(range(30, 42))


def test_a_table_that_was_saved_and_loaded_goes_on_alike():
    table = own_solutions((0, ["8", "so\n8"]), (10, ["well\n8"]))
    empty = new_method()
    other = empty.restored(json.loads(json.dumps(table.state_dict())))
    assert empty.table == {} and empty.due(0), "solutions are a value: restoring makes another one"
    assert other.state_dict() == table.state_dict()
    assert [other.due(step) for step in range(30)] == [table.due(step) for step in range(30)]
    assert other.solution_for("p0", "well\n8") == table.solution_for("p0", "well\n8")


def test_metrics_say_what_was_found_and_what_there_is():
    replies = [response_of("8$"), response_of("so\n8$"), response_of("9$"), response_of("9")] + [response_of("7$")] * 4
    tools = {"builder": BUILDER, "verifier": exact_match}
    table, metrics = new_method().refreshed(0, sums(2), generate=lambda requests: replies, **tools)
    wanted = {"problems": 2, "pass_rate": 0.25, "solved_share": 0.5, "available_share": 0.5, "length_mean": 3.5}
    assert metrics == {f"solutions/{name}": value for name, value in wanted.items()}
    table, metrics = table.refreshed(10, sums(2), generate=lambda requests: [response_of("7$")] * 8, **tools)
    assert metrics["solutions/solved_share"] == 0 and metrics["solutions/available_share"] == 0.5


def test_with_own_solutions_the_datas_are_neither_needed_nor_read(tmp_path):
    import tiny_run

    tiny_run.write_data(tmp_path, 4)
    records = [json.loads(line) for line in (tmp_path / "problems.jsonl").read_text().splitlines()]
    bare = [{key: value for key, value in record.items() if key != "solution"} for record in records]
    (tmp_path / "bare.jsonl").write_text("".join(json.dumps(record) + "\n" for record in bare))
    values = {"tokenizer": f"{tmp_path}/tokenizer", "teacher_template": "{problem}H{solution}|"}
    for name in ("problems.jsonl", "bare.jsonl"):
        data = {**values, "path": str(tmp_path / name)}
        run_data = RunData.load(
            from_mapping({"method": {"name": "own_solutions"}, "data": data, "rollout": {"max_new_tokens": 14}})
        )
        assert [p.solution for p in run_data.problems.problems] == [""] * 4
        assert [p.answer for p in run_data.problems.problems] == [record["answer"] for record in records]
    assert load_problems(tmp_path / "bare.jsonl", fields={"solution": None}).problems[0].solution == ""
