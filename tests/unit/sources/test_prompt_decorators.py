# Copyright (c) 2026 the megatron_selfdistill authors. Apache-2.0.
"""Own solutions and guidance decorate prompts: what each of them changes, and that old prompts stay as they were."""

from __future__ import annotations

from dataclasses import replace
from typing import Any
from unittest.mock import Mock

import pytest
import torch.distributed as dist
from characters import ONE_RANK, Characters

from megatron_selfdistill.data.problems import Problem
from megatron_selfdistill.data.prompts import PromptBuilder, PromptTemplates
from megatron_selfdistill.evaluation.verify import exact_match
from megatron_selfdistill.metrics import Phases
from megatron_selfdistill.rollout.base import Response
from megatron_selfdistill.sources.guidance import GuidedPrompts, SuccessRates
from megatron_selfdistill.sources.own_solutions import Finder, OwnSolutionPrompts, OwnSolutions, Solution
from megatron_selfdistill.sources.problem_prompts import Answer, GivenSolutions, Judge, Prompts
from megatron_selfdistill.sources.solution_search import Search

PROBLEM = Problem("p", ({"role": "user", "content": "1+7"},), "given", "8", "file.jsonl:1")
OTHER = Problem("q", ({"role": "user", "content": "2+7"},), "given", "9", "file.jsonl:2")
GIVEN = GivenSolutions(
    PromptBuilder(Characters(), PromptTemplates(teacher="{problem}|{solution}")), 40, 8, policy="error"
)
JUDGE = Judge(exact_match, Characters(), ONE_RANK)


def own_solutions(**table: list[str]) -> OwnSolutionPrompts:
    solutions = {name: [Solution(text, len(text), 0) for text in texts] for name, texts in table.items()}
    own = OwnSolutions(Search(4, 2, "shortest", 5), 10, solutions, refreshed_at=0)
    unused: Any = None
    return OwnSolutionPrompts(GIVEN, own, Finder(unused, exact_match, None, unused, Phases(), ONE_RANK, 8))


def answer(prompts: Prompts, problem: Problem, text: str) -> Answer:
    tokens = [ord(character) for character in text]
    log_probs = [-1.0] * len(tokens)
    response = Response(tokens, log_probs, log_probs, "stop" if text.endswith("$") else "length")
    return Answer(problem, prompts.pair(problem), response)


def shown(answer: Answer) -> str:
    return "".join(map(chr, answer.prompts.teacher_prompt))


@pytest.fixture
def no_collectives(monkeypatch):
    """Make a sum over ranks return the number of this rank."""
    monkeypatch.setattr(dist, "all_reduce", lambda tensor, group=None: tensor)


def test_given_solutions_are_shown_to_the_teacher_and_all_answers_are_trained_on():
    answers = [answer(GIVEN, PROBLEM, "8$"), answer(GIVEN, OTHER, "3")]
    assert GIVEN.choose(answers) == (answers, {}) and GIVEN.record(answers, set()) is GIVEN
    assert "given" in shown(answers[0]) and not GIVEN.guides(PROBLEM)


def test_an_own_solution_takes_the_place_of_the_given_one_but_never_of_itself(no_collectives):
    prompts = own_solutions(p=["so 8", "8"])
    answers = [answer(prompts, PROBLEM, "so 8$"), answer(prompts, PROBLEM, "7$"), answer(prompts, OTHER, "9$")]
    assert "so 8" in shown(answers[0]) and "given" not in shown(answers[0])
    chosen, metrics = prompts.choose(answers)
    assert [(one.problem.solution, one.response) for one in chosen] == [
        ("8", answers[0].response),
        ("so 8", answers[1].response),
    ]
    assert all(one.problem.solution in shown(one) for one in chosen)
    assert metrics == {"solutions/skipped_share": pytest.approx(1 / 3)}


def test_answers_without_an_own_solution_stay_for_their_rewards_where_these_count(no_collectives):
    prompts = replace(own_solutions(p=["so 8"]), keeps_unhinted=True)
    answers = [replace(answer(prompts, OTHER, "9$"), group=1), answer(prompts, PROBLEM, "7$")]
    chosen, metrics = prompts.choose(answers)
    assert [(one.group, one.hinted) for one in chosen] == [(1, False), (0, True)]
    assert chosen[0].prompts.teacher_prompt == chosen[0].prompts.student_prompt and "so 8" in shown(chosen[1])
    assert metrics == {"solutions/skipped_share": 0.5}


def test_guidance_goes_to_problems_with_a_solution():
    prompts = GuidedPrompts(own_solutions(p=["8"]), JUDGE, num_samples=2)
    assert prompts.guides(PROBLEM) and not prompts.guides(OTHER)
    assert prompts.is_guided(PROBLEM) and not prompts.is_guided(OTHER)
    assert GuidedPrompts(GIVEN, JUDGE, num_samples=2).guides(OTHER)


def test_success_rates_of_a_step_are_in_new_prompts_and_decide_the_next_step():
    before = GuidedPrompts(GIVEN, JUDGE, 2, SuccessRates(0.5))
    visits = [(PROBLEM, "8$"), (PROBLEM, "8"), (OTHER, "1$"), (OTHER, "2$")]  # the second one has no end: it is wrong
    answers = [answer(before, problem, text) for problem, text in visits]
    after = before.record(answers, guided=set())
    assert not before.guides(OTHER) and before.state_dict()["success"] == {}
    assert after.guides(OTHER) and not after.guides(PROBLEM), "of one problem half is right, of the other nothing"
    restored = before.restored(after.state_dict())
    assert restored.guides(OTHER) and restored.state_dict() == after.state_dict()


def test_a_search_is_made_only_when_it_is_due():
    prompts, unused = own_solutions(p=["8"]), Mock()
    assert prompts.prepare(9, unused, unused) == (prompts, {})
    with pytest.raises(AttributeError, match="update_weights"):  # a search would sample, and there is no sampler
        prompts.prepare(10, unused, unused)
