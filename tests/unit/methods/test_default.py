# Copyright (c) 2026 the megatron_selfdistill authors. Apache-2.0.
"""The default method: the teacher sees the given solution, and all responses are trained on alike."""

from __future__ import annotations

import pytest
from characters import Characters
from made_methods import given_with, made
from sums import written
from term_arrays import signals

from megatron_selfdistill.data.problems import Problem
from megatron_selfdistill.errors import ConfigError
from megatron_selfdistill.sources.method import prepared
from megatron_selfdistill.sources.rollouts import Rollout

PROBLEM = Problem("p", ({"role": "user", "content": "1+7"},), "given", "8", "file.jsonl:1")
GIVEN = given_with(Characters())


def test_given_solutions_are_shown_to_the_teacher_and_all_responses_are_trained_on():
    method = made([], GIVEN)
    rollouts = [Rollout(PROBLEM, method.prompts(PROBLEM), written(text)) for text in ("8$", "3")]
    assert "".join(map(chr, rollouts[0].prompts.teacher_prompt)) == "1+7|given:"
    assert method.select(0, rollouts) == method.texts(rollouts, rollouts) == (rollouts, {})
    assert (method.prepare, method.record, method.warnings) == (None, None, None)
    assert prepared(method, 3, None, None) == (method, {})
    assert method.coefficients(0, rollouts, []) is None and not method.weighs_tokens
    assert method.terms(0, rollouts, signals([0, 0], hinted=[True, False])).divergence.tolist() == [1.0, 0.0]
    assert method.state_dict() == {} and method.restored({"own": None}) is method


@pytest.mark.parametrize("name", ["opsd", "sdft"])
def test_methods_that_are_the_default_with_other_values_have_no_terms_of_their_own(name):
    assert not made([f"method.name={name}"], GIVEN).weighs_tokens


def test_a_verifier_needs_an_answer_to_every_problem_before_the_start():
    unanswered = Problem("q", PROBLEM.messages, "given", None, "file.jsonl:2")
    made([], GIVEN, problems=[unanswered])
    with pytest.raises((ConfigError, ValueError), match=r"^file.jsonl:2: expected an answer"):
        made(["method.name=rft"], GIVEN, problems=[PROBLEM, unanswered])
