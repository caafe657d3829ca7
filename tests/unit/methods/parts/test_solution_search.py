# Copyright (c) 2026 the megatron_selfdistill authors. Apache-2.0.
"""The choice of responses as solutions, by their answers and by the rule that ranks them."""

from __future__ import annotations

import itertools
import random
import re
from typing import Any

import pytest
import tiny
from characters import ONE_RANK, Characters
from made_methods import response_of
from sums import answered, sums

from megatron_selfdistill.config.schema.run_config import CONFIDENCE
from megatron_selfdistill.data.problem_sampler import ProblemSampler
from megatron_selfdistill.data.problems import Problem, ProblemSet
from megatron_selfdistill.evaluation.verify import exact_match
from megatron_selfdistill.methods.own_solutions import OwnSolutionsSettings
from megatron_selfdistill.methods.parts.solution_search import Attempt, content_of, solve
from megatron_selfdistill.rollout.base import Request, response_text
from megatron_selfdistill.rollout.sampling import sample_seed

BUILDER = tiny.given().builder


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


def attempt_of(*texts: str, **options: Any) -> Attempt:
    search = {"num_samples": len(texts), "keep": 9}
    (attempt,) = attempts_at(sums(1), lambda requests: list(map(response_of, texts)), search=search, **options)
    return attempt


def test_only_the_answer_decides_and_what_was_cut_off_or_says_nothing_is_no_solution():
    attempt = attempt_of("8", "9$", "so\n8$", "$", " $", "8$", "8 $", "not 8$")
    assert [c.correct for c in attempt.candidates] == [False, False, True, False, False, True, True, False]
    assert [c.text for c in attempt.kept] == ["8", "so\n8"], "one of each text, white space aside"
    assert attempt_of("$", " $", verifier=lambda text, problem: True).kept == []


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
    places = itertools.product((0, 1), ("", "eval/"), sums(), range(12))
    assert not streams & {sample_seed(5, step, prefix + problem.id, i) for step, prefix, problem, i in places}
    assert all(request.prompt == BUILDER.student_prompt(p) for request, p in zip(asked[::12], 2 * sums(), strict=True))


def test_the_verifier_does_not_see_a_stated_confidence_and_the_teacher_does():
    seen = []
    texts = [f"{text}\nConfidence: 0.85$" for text in ("8", "so 8")]
    verifier = {"verifier": lambda text, problem: seen.append(text) or True, "confidence": re.compile(CONFIDENCE)}
    attempt = attempt_of(*texts, **verifier)
    assert [text.strip() for text in seen] == ["8", "so 8"]
    assert [candidate.text for candidate in attempt.kept] == [text[:-1] for text in texts]


SAME = [
    *(("3 + 5 = 8", "3+5=8"), ("so\n8", "so\n\n  8 \n"), ("so\r\n8", "so\n8"), ("STRASSE 8", "straße 8")),
    *(("It is 8.", "it is 8"), ("It is 8。", "it is 8"), ("It is 8…", "it is 8"), ("It is 8", "It is 8 !?\n")),
    *(
        ("caf\u00e9 8", "cafe\u0301 8"),
        ("\uff11\uff10 is", "10 is"),
        ("so \u200b8\ufeff", "so 8"),
        ("so\u00a08", "so 8"),
    ),
]
OTHERS = [("8.5", "85"), ("It is 8", "It is -8"), ("8, since 3+5", "8 since 3+5"), ("8\n9", "9\n8"), ("!", "?")]


@pytest.mark.parametrize(("one", "other"), SAME + OTHERS)
def test_two_texts_are_one_response_but_for_form(one, other):
    assert (content_of(one) == content_of(other)) is ((one, other) in SAME)


def test_the_coming_problems_are_those_of_the_next_batches_and_nothing_moves():
    problem_sampler = ProblemSampler(ProblemSet(sums(9)), batch_size=4, seed=3)
    problem_sampler.next_batch()
    coming, before = problem_sampler.coming(3), problem_sampler.state_dict()
    assert problem_sampler.state_dict() == before
    batches = [problem.id for _ in range(3) for problem in problem_sampler.next_batch()]
    assert [problem.id for problem in coming] == list(dict.fromkeys(batches))
    assert len(batches) > len(coming), "an epoch ended within"
