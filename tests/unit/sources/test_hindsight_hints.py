# Copyright (c) 2026 the megatron_selfdistill authors. Apache-2.0.
"""Hints that follow the responses: peers, an environment's feedback, and the user's function of a group."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import pytest
import torch.distributed as dist
from characters import ONE_RANK, Characters

from megatron_selfdistill.config import load
from megatron_selfdistill.data.problems import Problem
from megatron_selfdistill.data.prompts import TEACHER_TEMPLATES, PromptBuilder, PromptTemplates
from megatron_selfdistill.errors import ConfigError, VerifierError
from megatron_selfdistill.prechecks import require_environment, require_functions
from megatron_selfdistill.rollout.base import Response
from megatron_selfdistill.sources.hindsight_hints import (
    FunctionHints,
    HindsightPrompts,
    Hints,
    PeerHints,
    PeerOrFeedbackHints,
    feedback_hints,
)
from megatron_selfdistill.sources.problem_prompts import Answer, GivenSolutions, Prompts

PROBLEM = Problem("p", ({"role": "user", "content": "1+7"},), "given", "8", "file.jsonl:1")
OTHER = Problem("q", ({"role": "user", "content": "2+7"},), "given", "9", "file.jsonl:2")
GIVEN = GivenSolutions(
    PromptBuilder(Characters(), PromptTemplates(teacher="{problem}|{solution}")), 40, 8, policy="error"
)
PEERS = PeerHints(Characters())


@pytest.fixture(autouse=True)
def no_collectives(monkeypatch):
    """Make a sum over ranks return the number of this rank, and a gathering its only part."""
    monkeypatch.setattr(dist, "all_reduce", lambda tensor, group=None: tensor)
    monkeypatch.setattr("megatron_selfdistill.evaluation.verify.gather_objects", lambda value: [value])


def answer(prompts: Prompts, problem: Problem, text: str) -> Answer:
    tokens = [ord(character) for character in text]
    log_probs = [-1.0] * len(tokens)
    response = Response(tokens, log_probs, log_probs, "stop" if text.endswith("$") else "length")
    return Answer(problem, prompts.pair(problem), response)


def shown(answer: Answer) -> str:
    return "".join(map(chr, answer.prompts.teacher_prompt))


def hinted(keeps_unhinted: bool, hints: Hints = PEERS, given: GivenSolutions = GIVEN) -> HindsightPrompts:
    return HindsightPrompts(given, ONE_RANK, keeps_unhinted, hints)


def judged(prompts: Prompts, group: int, problem: Problem, text: str, correct: bool) -> Answer:
    return replace(answer(prompts, problem, text), group=group, reward=float(correct))


def test_the_hint_is_the_first_other_right_response_of_the_group_without_its_thinking():
    prompts = hinted(keeps_unhinted=False)
    answers = [
        judged(prompts, 0, PROBLEM, "7$", False),
        judged(prompts, 0, PROBLEM, "hm</think> so 8$", True),
        judged(prompts, 0, PROBLEM, "8$", True),
        judged(prompts, 1, OTHER, "9$", True),
        judged(prompts, 1, OTHER, "1$", False),
        judged(prompts, 2, PROBLEM, "8$", False),
    ]
    chosen, metrics = prompts.choose(answers)
    assert [(one.response, one.problem.solution) for one in chosen] == [
        (answers[0].response, "so 8"),
        (answers[1].response, "8"),
        (answers[2].response, "so 8"),
        (answers[4].response, "9"),
    ]
    assert all(f"|{one.problem.solution}" in shown(one) and one.hinted for one in chosen)
    assert not any("given" in shown(one) or "hm" in shown(one) for one in (*chosen, *answers))
    assert metrics == {"hints/share": pytest.approx(4 / 6)}


def test_responses_without_a_peer_stay_for_their_rewards_where_these_count():
    prompts = hinted(keeps_unhinted=True)
    answers = [judged(prompts, 0, PROBLEM, "8$", True), judged(prompts, 0, PROBLEM, "7$", False)]
    chosen, metrics = prompts.choose(answers)
    assert [one.hinted for one in chosen] == [False, True] and metrics == {"hints/share": 0.5}
    assert chosen[0].prompts.teacher_prompt == chosen[0].prompts.student_prompt


def test_a_peer_that_does_not_fit_into_the_prompt_is_no_hint():
    prompts = hinted(keeps_unhinted=True)
    answers = [judged(prompts, 0, PROBLEM, "8" * 60 + "$", True), judged(prompts, 0, PROBLEM, "7$", False)]
    chosen, _ = prompts.choose(answers)
    assert [one.hinted for one in chosen] == [False, False]


FEEDBACK = "2 is wrong"
WIDE = GivenSolutions(
    PromptBuilder(Characters(), PromptTemplates(teacher=TEACHER_TEMPLATES["peer_or_feedback"])), 200, 8, policy="error"
)


def with_feedback(keeps_unhinted: bool) -> list[Answer]:
    """Return the chosen answers of a group with one right answer, and of a group without any."""
    prompts = hinted(keeps_unhinted, PeerOrFeedbackHints(PEERS), WIDE)
    answers = [
        judged(prompts, 0, PROBLEM, "8$", True),
        replace(judged(prompts, 0, PROBLEM, "7$", False), feedback="seen by nobody"),
        replace(judged(prompts, 1, OTHER, "2$", False), feedback=FEEDBACK),
        judged(prompts, 1, OTHER, "3$", False),
    ]
    return prompts.choose(answers)[0]


def test_the_teacher_sees_feedback_only_where_there_is_no_peer_in_the_words_of_sdpo():
    assert [shown(one) for one in with_feedback(keeps_unhinted=False)] == [
        "1+7\nCorrect solution:\n\n8\n\nCorrectly solve the original question.:",
        "2+7\nThe following is feedback from your unsuccessful earlier attempt:\n\n2 is wrong"
        "\n\nCorrectly solve the original question.:",
    ]


def test_responses_with_neither_peer_nor_feedback_stay_for_their_rewards_where_these_count():
    chosen = with_feedback(keeps_unhinted=True)
    assert [one.hinted for one in chosen] == [False, True, True, False]
    assert chosen[0].prompts.teacher_prompt == chosen[0].prompts.student_prompt


def test_feedback_alone_needs_no_reward_and_white_space_is_none():
    prompts = hinted(False, feedback_hints, replace(WIDE, builder=GIVEN.builder))
    texts = [FEEDBACK, None, " \n"]
    answers = [replace(answer(prompts, PROBLEM, "7$"), feedback=text) for text in texts]
    chosen, metrics = prompts.choose(answers)
    assert [shown(one) for one in chosen] == ["1+7|2 is wrong:"] and metrics == {"hints/share": pytest.approx(1 / 3)}


def longest_other(problem: Problem, responses: Sequence[tuple[str, float]]) -> list[str | None]:
    """Return for each wrong response the longest other response with the reward, and nothing for the right ones."""
    hints: list[str | None] = []
    for i, (_, reward) in enumerate(responses):
        others = [f"{text}={value:g}" for j, (text, value) in enumerate(responses) if j != i]
        hints.append(max(others, key=len) if reward < 0.5 and others else None)
    return hints


def test_a_function_of_the_group_gives_hints():
    prompts = hinted(True, FunctionHints(longest_other, Characters(), ONE_RANK))
    answers = [
        judged(prompts, 0, PROBLEM, "so 8$", True),
        judged(prompts, 4, OTHER, "1", False),
        judged(prompts, 4, OTHER, "22$", False),
        judged(prompts, 0, PROBLEM, "7$", False),
        judged(prompts, 6, PROBLEM, "7$", False),
    ]
    chosen, metrics = prompts.choose(answers)
    assert [one.problem.solution if one.hinted else None for one in chosen] == [None, "22=0", "1=0", "so 8=1", None]
    assert all(f"|{one.problem.solution}" in shown(one) for one in chosen if one.hinted)
    assert metrics == {"hints/share": pytest.approx(3 / 5)}


@pytest.mark.parametrize(
    ("result", "words"),
    [
        (["a"], "expected one text or None for each of 2 responses, got 1"),
        ("ab", "expected one text or None for each of 2 responses, got a value of type str"),
        (["a", 3], "got a value of type int"),
        (["a", "cut \ud83d"], "expected text that can be written as UTF-8, got half of a surrogate pair"),
        (None, "got a value of type NoneType"),
    ],
)
def test_a_function_that_returns_anything_else_ends_the_run_with_its_place(result, words):
    prompts = hinted(True, FunctionHints(lambda problem, responses: result, Characters(), ONE_RANK))
    answers = [judged(prompts, 0, PROBLEM, "8$", True), judged(prompts, 0, PROBLEM, "7$", False)]
    with pytest.raises(VerifierError) as caught:
        prompts.choose(answers)
    assert "file.jsonl:1: the hint function failed with ValueError" in str(caught.value) and words in str(caught.value)


@pytest.mark.parametrize("hint", ["feedback", "peer_or_feedback"])
def test_feedback_without_an_environment_is_refused_before_the_start(hint):
    config = load([f"data.solutions={hint}", "rollout.num_samples=2"])
    with pytest.raises(ConfigError, match=f"data.solutions={hint} shows the teacher the feedback of an environment"):
        require_environment(config)
    require_environment(replace(config, environment=replace(config.environment, name="http", url="http://a:1")))


@pytest.mark.parametrize("key", ["data.solutions", "rollout.select", "hints.summarizer", "hints.judge"])
@pytest.mark.parametrize(
    ("path", "words"), [("nowhere.function", "nowhere cannot be imported"), ("json.nothing", "no attribute 'nothing'")]
)
def test_a_function_that_cannot_be_imported_is_refused_before_the_start(key, path, words):
    sources = {"hints.summarizer": ["data.solutions=skill"], "hints.judge": ["recipe=openclaw"]}
    needed = sources.get(key, [])
    config = load([*needed, f"{key}={path}"])
    with pytest.raises(ConfigError) as caught:
        require_functions(config)
    assert str(caught.value).startswith(f"{key} must be") and words in str(caught.value)
    require_functions(load([*needed, f"{key}=json.dumps"]))
