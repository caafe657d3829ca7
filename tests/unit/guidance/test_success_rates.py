# Copyright (c) 2026 the megatron_selfdistill authors. Apache-2.0.
"""Guidance goes to the problems that the student alone rarely solves, and stops when it solves them."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from types import SimpleNamespace

import tiny
from characters import ONE_RANK, Characters
from made_methods import given_with, made, response_of

from megatron_selfdistill.data.problem_sampler import ProblemSampler
from megatron_selfdistill.data.problems import ProblemSet
from megatron_selfdistill.evaluation.verify import exact_match
from megatron_selfdistill.guidance.guided_on_policy import GuidedOnPolicy, GuidedState
from megatron_selfdistill.guidance.success_rates import PROBE_EVERY, WINDOW, Guidance, SuccessRates
from megatron_selfdistill.metrics.phases import Phases
from megatron_selfdistill.rollout.base import Request, Response, SamplingParams
from megatron_selfdistill.sources.judge import Judge
from megatron_selfdistill.sources.on_policy import OnPolicyOptions
from megatron_selfdistill.sources.rollouts import Rollout

PROBLEM, OTHER = tiny.problem("1+7", "given", "8"), tiny.problem("2+7", "given", "9", id="q")
METHOD = made([], given_with(Characters()))
JUDGE = Judge(exact_match, Characters(), ONE_RANK)


def test_the_teacher_that_guides_guides_the_problems_that_it_alone_teaches():
    guidance = Guidance(JUDGE, 1, guide="math")
    shares = (("code", 0.5), ("math", 0.5))
    problems = [PROBLEM, replace(PROBLEM, teacher="math"), replace(PROBLEM, teacher="math", shares=shares)]
    assert [guidance.guides(problem, METHOD) for problem in problems] == [False, True, False]
    assert Guidance(JUDGE, 1).guides(PROBLEM, METHOD)


class Visited:
    """Problem "a", visited again and again; the mix always solves it."""

    def __init__(self, rates: SuccessRates) -> None:
        self.rates = rates

    def visit(self, share_alone: float) -> bool:
        guided = self.rates.guides("a")
        self.rates = self.rates.recorded([("a", guided, 1.0 if guided else share_alone)])
        return guided


def test_a_problem_that_is_never_solved_is_guided_but_for_every_fourth_visit():
    problem = Visited(SuccessRates(0.3))
    guided = [problem.visit(0.0) for _ in range(1 + 3 * PROBE_EVERY)]
    assert guided == [False] + 3 * ([True] * (PROBE_EVERY - 1) + [False])


def test_success_under_guidance_ends_no_guidance_and_success_alone_does():
    problem = Visited(SuccessRates(0.5))
    problem.visit(0.0)
    assert all(problem.visit(0.0) for _ in range(PROBE_EVERY - 1)), "the mix's success is not the student's"
    while not all(not problem.visit(1.0) for _ in range(2)):
        pass
    assert [problem.visit(1.0) for _ in range(8)] == [False] * 8


def test_the_rate_is_the_mean_of_the_last_visits_alone():
    rates = SuccessRates(0.5)
    rates = rates.recorded([("a", False, 1.0)] * 10 + [("a", False, 0.0)] * (WINDOW // 2))
    assert not rates.guides("a"), "half of the last four were right"
    assert rates.recorded([("a", False, 0.0)]).guides("a")
    assert not rates.guides("a"), "rates are a value: a record is another one"


def test_guidance_goes_to_problems_with_a_solution():
    own, guidance = SimpleNamespace(has_solution=lambda problem: problem is PROBLEM), Guidance(JUDGE, num_samples=2)
    assert guidance.guides(PROBLEM, own) and not guidance.guides(OTHER, own)
    assert guidance.guides(OTHER, METHOD), "the default method has a solution to every problem"


def test_success_rates_of_a_step_are_in_a_new_guidance_and_decide_the_next_step():
    before = Guidance(JUDGE, 2, SuccessRates(0.5))
    visits = [(PROBLEM, "8$"), (PROBLEM, "8"), (OTHER, "1$"), (OTHER, "2$")]  # the second one has no end: it is wrong
    rollouts = [Rollout(problem, METHOD.prompts(problem), response_of(text)) for problem, text in visits]
    after = before.record(rollouts)
    assert not before.guides(OTHER, METHOD) and before.state_dict() == {}
    assert after.guides(OTHER, METHOD), "nothing is right"
    assert not after.guides(PROBLEM, METHOD), "half is right"
    restored = before.restored(after.state_dict())
    assert restored.guides(OTHER, METHOD) and restored.state_dict() == after.state_dict()
    assert Guidance(JUDGE, 2).state_dict() is None


class Asked:
    def update_weights(self, version: int) -> None:
        pass

    def generate(self, requests: Sequence[Request], params: SamplingParams) -> list[Response]:
        self.requests = list(requests)
        return [Response([ord("$")], [-1.0], [-0.25], "stop", [-2.0] if it.teacher_prompt else None) for it in requests]


def test_the_requests_of_problems_that_guidance_chooses_have_the_prompt_of_the_teacher(monkeypatch):
    monkeypatch.setattr(SuccessRates, "guides", lambda self, name: name == "p")
    monkeypatch.setattr(Guidance, "record", lambda self, rollouts: replace(self, num_samples=7))
    problems = [replace(PROBLEM, id=name) for name in "pqr"]
    sampler, method = Asked(), made([], given_with(Characters()), problems=problems)
    problem_sampler = ProblemSampler(ProblemSet(problems), batch_size=3, seed=1)
    options = OnPolicyOptions(sampler, Phases(), ONE_RANK, 1, 1, False, 2.0, False, None, 0, None)
    source = GuidedOnPolicy(GuidedState(problem_sampler, method, Guidance(JUDGE, 1, SuccessRates(0.5))), options)
    batch = source.next_step(0, SamplingParams(8))
    guided = {one.id: request.teacher_prompt for one, request in zip(batch.problems, sampler.requests, strict=True)}
    assert [name for name, prompt in guided.items() if prompt is not None] == ["p"]
    assert [it.teacher_prompt for it in batch.contexts if it.problem_id == "p"] == [guided["p"]]
    assert (batch.metrics["guided/share"], batch.metrics["guided/log_ratio"]) == (1 / 3, 0.75)
    source.commit(batch)
    assert source.state.guidance.num_samples == 7, "what the responses show decides about the next step"
