# Copyright (c) 2026 the megatron_selfdistill authors. Apache-2.0.
"""The choice of responses as solutions, by their answers and by the rule that ranks them."""

from __future__ import annotations

import dataclasses
import random
import re
from typing import Any

import pytest
from characters import ONE_RANK, Characters
from made_methods import response_of
from sums import answered, sums

from megatron_selfdistill.config.schema.run_config import CONFIDENCE
from megatron_selfdistill.data.problem_sampler import ProblemSampler
from megatron_selfdistill.data.problems import Problem, ProblemSet
from megatron_selfdistill.data.prompt_templates import PromptTemplates
from megatron_selfdistill.data.prompts import PromptBuilder
from megatron_selfdistill.evaluation.verify import exact_match
from megatron_selfdistill.methods.own_solutions import OwnSolutionsSettings
from megatron_selfdistill.methods.parts.solution_search import Attempt, content_of, solve
from megatron_selfdistill.rollout.base import Request, response_text
from megatron_selfdistill.rollout.sampling import sample_seed

BUILDER = PromptBuilder(Characters(), PromptTemplates(teacher="{problem}|{solution}"))


def attempts_at(problems: list[Problem], generate: Any = None, step: int = 4, **options: Any) -> list[Attempt]:
    search = OwnSolutionsSettings(**({"num_samples": 12, "keep": 3} | options.pop("search", {})))
    generate = generate or (lambda requests: [answered(request) for request in requests])
    settings = {"builder": BUILDER, "verifier": exact_match, "grid": ONE_RANK, "seed": 5} | options
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


def test_only_the_answer_decides_and_what_was_cut_off_or_says_nothing_is_no_solution():
    texts = ["8", "9$", "so\n8$", "$", " $", "8$", "8 $", "not 8$"]
    (attempt,) = attempts_at(
        sums(1),
        generate=lambda requests: [response_of(text) for text in texts],
        search={"num_samples": len(texts), "keep": 9},
    )
    assert [c.correct for c in attempt.candidates] == [False, False, True, False, False, True, True, False]
    assert [c.text for c in attempt.kept] == ["8", "so\n8"], "one of each text, white space aside"
    anything = attempts_at(
        sums(1),
        generate=lambda requests: [response_of("$"), response_of(" $")],
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
    assert calls == []


def test_the_verifier_does_not_see_a_stated_confidence_and_the_teacher_does():
    seen = []

    def verifier(text: str, problem: Problem) -> bool:
        seen.append(text)
        return True

    texts = [f"{text}\nConfidence: 0.85$" for text in ("8", "so 8")]
    attempts = attempts_at(
        sums(1),
        generate=lambda requests: [response_of(text) for text in texts],
        verifier=verifier,
        confidence=re.compile(CONFIDENCE),
        search={"num_samples": 2},
    )
    assert [text.strip() for text in seen] == ["8", "so 8"]
    assert [candidate.text for candidate in attempts[0].kept] == [text[:-1] for text in texts]


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


def test_the_coming_problems_are_those_of_the_next_batches_and_nothing_moves():
    problem_sampler = ProblemSampler(ProblemSet(sums(9)), batch_size=4, seed=3)
    problem_sampler.next_batch()
    coming, before = problem_sampler.coming(3), problem_sampler.state_dict()
    assert problem_sampler.state_dict() == before
    batches = [problem.id for _ in range(3) for problem in problem_sampler.next_batch()]
    assert [problem.id for problem in coming] == list(dict.fromkeys(batches))
    assert len(batches) > len(coming), "an epoch ended within"
