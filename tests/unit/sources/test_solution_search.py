# Copyright (c) 2026 the megatron_selfdistill authors. Apache-2.0.
"""The choice of responses as solutions; no response is ever its own solution."""

from __future__ import annotations

import dataclasses
import json
import random
import re
from typing import Any

import pytest
from characters import ONE_RANK, Characters
from record_sources import load_problems

from megatron_selfdistill.config import from_mapping
from megatron_selfdistill.config.schema.run_config import CONFIDENCE
from megatron_selfdistill.data.problems import Problem, ProblemSampler, ProblemSet
from megatron_selfdistill.data.prompts import PromptBuilder, PromptTemplates
from megatron_selfdistill.evaluation.verify import exact_match
from megatron_selfdistill.rollout.base import Request, Response, response_text, sample_seed
from megatron_selfdistill.run_data import RunData
from megatron_selfdistill.sources.own_solutions import OwnSolutions
from megatron_selfdistill.sources.problem_prompts import GivenSolutions
from megatron_selfdistill.sources.solution_search import Attempt, Search, content_of, solve

BUILDER = PromptBuilder(Characters(), PromptTemplates(teacher="{problem}|{solution}"))


def answered(request: Request) -> Response:
    """Behind ``a+b:``, as the stream says: the sum after some steps, a wrong one, or one without an end."""
    a, b = "".join(map(chr, request.prompt)).rstrip(":").split("+")
    rng = random.Random(request.seed)
    text = "so\n" * rng.randrange(4) + str(int(a) + int(b) + (rng.random() < 0.3))
    cut = rng.random() < 0.2
    return written(text + ("" if cut else "$"), [-rng.random() for _ in range(len(text) + (not cut))])


def written(text: str, log_probs: list[float] | None = None) -> Response:
    log_probs = log_probs if log_probs is not None else [-1.0] * len(text)
    return Response([ord(c) for c in text], log_probs, log_probs, "stop" if text.endswith("$") else "length")


def sums(count: int = 9) -> list[Problem]:
    return [
        Problem(f"p{a}", ({"role": "user", "content": f"{a}+8"},), "", str(a + 8), f"file.jsonl:{a}")
        for a in range(count)
    ]


def attempts_at(problems: list[Problem], generate: Any = None, step: int = 4, **options: Any) -> list[Attempt]:
    search = Search(**({"num_samples": 12, "keep": 3, "pick": "shortest", "seed": 5} | options.pop("search", {})))
    generate = generate or (lambda requests: [answered(request) for request in requests])
    settings = {"builder": BUILDER, "verifier": exact_match, "grid": ONE_RANK} | options
    return solve(problems, search, step, generate=generate, **settings)


def ranked(attempt: Attempt, rule: str, key: Any) -> list[str]:
    """Return the texts that ``rule`` should keep: the best three different texts, computed step by step."""
    right = [c for c in attempt.candidates if c.text.split()[-1] == attempt.problem.answer and not c.response.truncated]
    best: list[str] = []
    for candidate in sorted(right, key=lambda c: (key(c), c.sample)):
        if candidate.text not in best:
            best.append(candidate.text)
    return best[:3]


@pytest.mark.parametrize(
    ("pick", "key"),
    [
        ("shortest", lambda c: len(c.response.token_ids)),
        ("most_likely", lambda c: -sum(c.response.log_probs) / len(c.response.log_probs)),
        ("learnable", lambda c: -random.Random(c.text + str(c.response.log_probs)).random()),
    ],
)
def test_each_rule_keeps_the_best_of_the_right_ones(pick, key):
    def score(those: Any) -> list[float]:
        return [random.Random(response_text(r, Characters()) + str(r.log_probs)).random() for _, r in those]

    found = attempts_at(sums(), search={"pick": pick}, score=score)
    assert [[c.text for c in attempt.kept] for attempt in found] == [ranked(a, pick, key) for a in found]
    assert sum(len(attempt.kept) > 1 for attempt in found) > 5


def test_random_depends_on_seed_problem_and_step_only():
    def kept(**options: Any) -> list[list[int]]:
        ordered = attempts_at(
            sums(), generate=same_texts, search={"pick": "random", **options.pop("search", {})}, **options
        )
        return [[c.sample for c in attempt.kept] for attempt in ordered]

    def same_texts(requests: list[Request]) -> list[Response]:
        return [
            written(f"{'so ' * (i % 12)}\n{sum(map(int, ''.join(map(chr, r.prompt[:-1])).split('+')))}$")
            for i, r in enumerate(requests)
        ]

    first = kept()
    assert kept() == first and len({tuple(samples) for samples in first}) > 5
    assert kept(step=5) != first and kept(search={"seed": 6}) != first


def test_only_the_answer_decides_and_what_was_cut_off_or_says_nothing_is_no_solution():
    texts = ["8", "9$", "so\n8$", "$", " $", "8$", "8 $", "not 8$"]
    (attempt,) = attempts_at(
        sums(1),
        generate=lambda requests: [written(text) for text in texts],
        search={"num_samples": len(texts), "keep": 9},
    )
    assert [c.correct for c in attempt.candidates] == [False, False, True, False, False, True, True, False]
    assert [c.text for c in attempt.kept] == ["8", "so\n8"], "one of each text, white space aside"
    anything = attempts_at(
        sums(1),
        generate=lambda requests: [written("$"), written(" $")],
        search={"num_samples": 2},
        verifier=lambda text, problem: True,
    )
    assert anything[0].kept == []


def test_what_a_step_could_not_show_is_not_kept():
    found = attempts_at(sums(), fits=lambda problem, text: "so" not in text)
    assert any(any("so" in c.text for c in a.candidates if c.correct) for a in found)
    assert all("so" not in c.text for attempt in found for c in attempt.kept)


def test_solutions_have_random_streams_of_their_own():
    asked: list[Request] = []
    for step in (0, 1):
        attempts_at(sums(), generate=lambda rs: (asked.extend(rs), [answered(r) for r in rs])[1], step=step)
    streams = {request.seed for request in asked}
    assert len(streams) == len(asked) == 2 * 9 * 12
    others = {
        sample_seed(5, step, prefix + problem.id, i)
        for step in (0, 1)
        for prefix in ("", "eval/")
        for problem in sums()
        for i in range(12)
    }
    assert not streams & others
    assert all(request.prompt == BUILDER.student_prompt(p) for request, p in zip(asked[::12], 2 * sums(), strict=True))


def test_problems_without_answers_are_named_before_anything_is_sampled():
    calls: list[Any] = []
    problems = [*sums(), dataclasses.replace(sums(1)[0], id="q", answer=None)]
    with pytest.raises(ValueError, match=r"^file.jsonl:0: expected an answer .* 1 of 10 problems"):
        attempts_at(problems, generate=calls.append)
    with pytest.raises(ValueError, match="pick=learnable expected a function"):
        attempts_at(sums(), search={"pick": "learnable"})
    assert calls == []


def table_in_layout(sizes: dict[str, int], pick: str, count: int = 9) -> tuple[dict, dict[str, float], int]:
    """(state, metrics, calls of the score); scores are made up, from the texts."""
    from megatron_selfdistill.config import ParallelConfig
    from megatron_selfdistill.distributed import ranks

    grid = ranks.initialize(ParallelConfig(**sizes), 0)
    calls = []

    def score(those: Any) -> list[float]:
        calls.append(those)
        return [random.Random(str(response.log_probs)).random() for _, response in those]

    table = OwnSolutions(Search(6, 2, pick, 5), refresh_every=3)
    table, metrics = table.refreshed(
        4,
        sums(count),
        4,
        grid=grid,
        generate=lambda requests: [answered(request) for request in requests],
        builder=BUILDER,
        verifier=exact_match,
        score=score,
    )
    return table.state_dict(), metrics, len(calls)


@pytest.mark.parametrize("sizes", [{}, {"tensor_model_parallel_size": 2}, {"context_parallel_size": 2}])
@pytest.mark.parametrize("pick", ["shortest", "learnable"])
def test_every_layout_finds_the_same_solutions(ranks, sizes, pick):
    alone = ranks.run(table_in_layout, {}, pick, world_size=1)[0]
    assert sum(bool(kept) for kept in alone[0]["table"].values()) > 5
    # 5 problems: in the last group of one, the second replica has none, and scores all the same
    assert ranks.run(table_in_layout, sizes, pick, world_size=2) == [alone] * 2
    few = ranks.run(table_in_layout, {}, pick, 5, world_size=2)
    assert few[0] == few[1] and few[0][2] == (2 if pick == "learnable" else 0)


def failing_solve() -> str:
    from megatron_selfdistill.config import ParallelConfig
    from megatron_selfdistill.distributed import ranks

    grid = ranks.initialize(ParallelConfig(tensor_model_parallel_size=2), 0)
    with pytest.raises(RuntimeError) as failure:
        attempts_at(sums(3), grid=grid, verifier=verifier_that_fails)
    return str(failure.value)


def test_the_verifier_does_not_see_a_stated_confidence_and_the_teacher_does():
    seen = []

    def verifier(text: str, problem: Problem) -> bool:
        seen.append(text)
        return True

    texts = [f"{text}\nConfidence: 0.85$" for text in ("8", "so 8")]
    attempts = attempts_at(
        sums(1),
        generate=lambda requests: [written(text) for text in texts],
        verifier=verifier,
        confidence=re.compile(CONFIDENCE),
        search={"num_samples": 2},
    )
    assert [text.strip() for text in seen] == ["8", "so 8"]
    assert [candidate.text for candidate in attempts[0].kept] == [text[:-1] for text in texts]


def verifier_that_fails(text: str, problem: Problem) -> bool:
    if problem.id == "p1":
        raise KeyError("unit")
    return True


def test_a_verifier_that_fails_on_one_rank_stops_all_of_them(ranks):
    assert ranks.run(failing_solve, world_size=2) == ["file.jsonl:1: the verifier failed with KeyError: 'unit'"] * 2


def own_solutions(*found: tuple[int, list[str]], keep: int = 2) -> OwnSolutions:
    """Return a table after searches that found these texts, at these steps, for one problem."""
    table = OwnSolutions(Search(4, keep, "shortest", 5), refresh_every=10)
    for step, texts in found:
        replies = [written(f"{text}$") for text in texts] + [written("wrong$")] * (4 - len(texts))
        tools = {"generate": lambda requests, replies=replies: replies, "builder": BUILDER, "verifier": exact_match}
        table, _ = table.refreshed(step, sums(1), 8, grid=ONE_RANK, **tools)
    return table


def test_no_response_is_its_own_hint():
    table = own_solutions((0, ["8", "so\n8"]))
    assert table.solution_for("p0").text == "8"
    assert table.solution_for("p0", "7").text == "8"
    assert table.solution_for("p0", "8").text == table.solution_for("p0", " 8\n").text == "so\n8"
    alone = own_solutions((0, ["8"]))
    assert alone.solution_for("p0", "8") is None and alone.solution_for("p0", "9").text == "8"
    assert alone.solution_for("unknown") is None
    assert own_solutions((0, [])).solution_for("p0") is None


class WithMarks(Characters):
    """``#`` is a special token."""

    def decode(self, ids, *, skip_special_tokens=False):
        text = super().decode(ids)
        return text.replace("#", "") if skip_special_tokens else text


@pytest.mark.parametrize(
    ("one", "other", "same"),
    [
        ("3 + 5 = 8", "3+5=8", True),
        ("so\n8", "so\n\n  8 \n", True),
        ("so\r\n8", "so\n8", True),
        ("It is 8.", "it is 8", True),
        ("It is 8", "It is 8 !?\n", True),
        ("It is 8。", "it is 8", True),
        ("It is 8…", "it is 8", True),
        ("caf\u00e9 8", "cafe\u0301 8", True),
        ("\uff11\uff10 is", "10 is", True),
        ("so \u200b8\ufeff", "so 8", True),
        ("so\u00a08", "so 8", True),
        ("STRASSE 8", "straße 8", True),
        ("8.5", "85", False),
        ("It is 8", "It is -8", False),
        ("8, since 3+5", "8 since 3+5", False),
        ("8\n9", "9\n8", False),
        ("!", "?", False),
    ],
)
def test_two_texts_are_one_response_but_for_form(one, other, same):
    assert (content_of(one) == content_of(other)) is same


def test_a_response_that_is_its_hint_but_for_form_gets_another_hint_or_none():
    table = own_solutions((0, ["so\n8", "It is\n8"]))
    for response in ("so\n8", "so  8", "So \n\n8.", "s\u200bo\n8\n"):
        assert table.solution_for("p0", response).text == "It is\n8"
        assert own_solutions((0, ["so\n8"])).solution_for("p0", response) is None
    assert table.solution_for("p0", "").text == "so\n8"


def test_twins_take_one_place_among_the_solutions_that_are_kept():
    texts = ["so\n8", "So  \n8", "so\n\n8", "hence\n8"]
    assert [s["text"] for s in own_solutions((0, texts)).state_dict()["table"]["p0"]] == ["so\n8", "hence\n8"]
    table = own_solutions((0, ["so\n8"]), (10, ["SO\n8"]), keep=3)
    assert [(s["text"], s["step"]) for s in table.state_dict()["table"]["p0"]] == [("SO\n8", 10)]


def test_special_tokens_do_not_make_a_response_another_than_its_hint():
    table = own_solutions((0, ["so\n8"]))
    response = response_text(written("#so\n#8$"), WithMarks())
    assert response == "so\n8" and table.solution_for("p0", response) is None


def test_new_solutions_come_first_and_old_ones_fill_up():
    table = own_solutions((0, ["8", "so\n8"]), (10, ["well\n8"]))
    assert [(s["text"], s["step"]) for s in table.state_dict()["table"]["p0"]] == [("well\n8", 10), ("8", 0)]
    table = own_solutions((0, ["8", "so\n8"]), (10, ["well\n8", "8", "hence\n8"]))
    assert [(s["text"], s["step"]) for s in table.state_dict()["table"]["p0"]] == [("8", 10), ("well\n8", 10)]
    assert own_solutions((0, ["8"]), (10, [])).solution_for("p0").step == 0


def test_a_search_is_due_at_the_start_and_every_so_many_steps():
    table = OwnSolutions(Search(4, 2, "shortest", 5), refresh_every=10)
    assert table.due(0) and table.due(7)
    table = own_solutions((20, ["8"]))
    assert [step for step in range(20, 42) if table.due(step)] == list(range(30, 42))


def test_a_table_that_was_saved_and_loaded_goes_on_alike():
    table = own_solutions((0, ["8", "so\n8"]), (10, ["well\n8"]))
    empty = OwnSolutions(table.search, table.refresh_every)
    other = empty.restored(json.loads(json.dumps(table.state_dict())))
    assert empty.table == {} and empty.due(0), "solutions are a value: restoring makes another one"
    assert other.state_dict() == table.state_dict()
    assert [other.due(step) for step in range(30)] == [table.due(step) for step in range(30)]
    assert other.solution_for("p0", "well\n8") == table.solution_for("p0", "well\n8")


def test_metrics_say_what_was_found_and_what_there_is():
    replies = [written("8$"), written("so\n8$"), written("9$"), written("9")] + [written("7$")] * 4
    table = OwnSolutions(Search(4, 2, "shortest", 5), refresh_every=10)
    tools = {"builder": BUILDER, "verifier": exact_match, "grid": ONE_RANK}
    table, metrics = table.refreshed(0, sums(2), 8, generate=lambda requests: replies, **tools)
    wanted = {"problems": 2, "pass_rate": 0.25, "solved_share": 0.5, "available_share": 0.5, "length_mean": 3.5}
    assert metrics == {f"solutions/{name}": value for name, value in wanted.items()}
    table, metrics = table.refreshed(10, sums(2), 8, generate=lambda requests: [written("7$")] * 8, **tools)
    assert metrics["solutions/solved_share"] == 0 and metrics["solutions/available_share"] == 0.5


@pytest.mark.parametrize(("policy", "fits"), [("error", False), ("drop", False), ("truncate_end", True)])
def test_a_solution_that_does_not_fit_is_skipped_or_cut(policy, fits):
    given = GivenSolutions(BUILDER, max_length=12, max_new_tokens=4, policy=policy)
    assert len(given.pair_with(sums(1)[0], "8").teacher_prompt) == len("0+8|8:")
    assert (given.pair_with(sums(1)[0], "so it is 8") is not None) is fits


def test_the_coming_problems_are_those_of_the_next_batches_and_nothing_moves():
    problems = ProblemSet(sums(9))
    problem_sampler = ProblemSampler(problems, batch_size=4, seed=3)
    problem_sampler.next_batch()
    coming, before = problem_sampler.coming(3), problem_sampler.state_dict()
    assert problem_sampler.state_dict() == before
    batches = [problem.id for _ in range(3) for problem in problem_sampler.next_batch()]
    assert [problem.id for problem in coming] == list(dict.fromkeys(batches))
    assert len(batches) > len(coming), "an epoch ended within"


def test_with_own_solutions_the_datas_are_neither_needed_nor_read(tmp_path):
    import tiny_run

    tiny_run.write_data(tmp_path, 4)
    records = [json.loads(line) for line in (tmp_path / "problems.jsonl").read_text().splitlines()]
    bare = [{key: value for key, value in record.items() if key != "solution"} for record in records]
    (tmp_path / "bare.jsonl").write_text("".join(json.dumps(record) + "\n" for record in bare))
    values = {"tokenizer": f"{tmp_path}/tokenizer", "teacher_template": "{problem}H{solution}|", "solutions": "own"}
    for name in ("problems.jsonl", "bare.jsonl"):
        data = {**values, "path": str(tmp_path / name)}
        run_data = RunData.load(from_mapping({"data": data, "rollout": {"max_new_tokens": 14}}))
        assert [p.solution for p in run_data.problems.problems] == [""] * 4
        assert [p.answer for p in run_data.problems.problems] == [record["answer"] for record in records]
    assert load_problems(tmp_path / "bare.jsonl", fields={"solution": None}).problems[0].solution == ""
