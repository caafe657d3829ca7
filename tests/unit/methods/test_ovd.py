# Copyright (c) 2026 the megatron_selfdistill authors. Apache-2.0.
"""OVD: the teacher's scores, the question for them, the rewards, and which responses a filter replaces."""

from __future__ import annotations

import math
from collections.abc import Sequence
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from characters import Characters, text_of
from made_methods import given_with, made

from megatron_selfdistill.data.contexts import PromptPair
from megatron_selfdistill.data.problems import Problem
from megatron_selfdistill.methods import ovd
from megatron_selfdistill.methods.ovd import auroc, verbal_scores
from megatron_selfdistill.rollout.base import Request, Response
from megatron_selfdistill.rollout.sampling import sample_seed
from megatron_selfdistill.sources.judge import Judge
from megatron_selfdistill.sources.rollouts import Rollout

BUILDER = given_with(Characters()).builder
PROBLEM = Problem("a", ({"role": "user", "content": "2+2"},), "=4.", "4", "file:1")
PAIR = PromptPair("a", BUILDER.student_prompt(PROBLEM), BUILDER.teacher_prompt(PROBLEM), "=4.")
TEMPLATE, SEED, STEP = "{problem}/{solution}/{response}?", 7, 3


@pytest.fixture(autouse=True)
def alone(one_rank, monkeypatch):
    monkeypatch.setattr(ovd, "gather_items", lambda items, group=None: list(items))
    monkeypatch.setattr(Judge, "rewards", lambda self, rollouts: [float(text(one)[0] == "4") for one in rollouts])


def response(content: str) -> Response:
    ids = list(map(ord, content))
    return Response(ids, [-1.0] * len(ids), [-2.0] * len(ids), "stop")


def text(rollout: Rollout) -> str:
    return text_of(rollout.response.token_ids)


def rollouts(*contents: str, group: int = 0) -> list[Rollout]:
    return [Rollout(PROBLEM, PAIR, response(one), group, reward=float(one[0] == "4")) for one in contents]


class Teacher:
    """Log-probs in which the last digit before the question mark is certain, with a mass of a half."""

    def __init__(self) -> None:
        self.questions: list[str] = []

    def __call__(self, prompts: Sequence[Sequence[int]], token_ids: Sequence[int]) -> torch.Tensor:
        assert list(token_ids) == list(map(ord, "0123456789"))
        self.questions += ["".join(map(chr, prompt)) for prompt in prompts]
        found = torch.full((len(prompts), 10), -torch.inf, dtype=torch.float64)
        for row, prompt in enumerate(prompts):
            last = next(chr(token) for token in reversed(prompt) if chr(token).isdigit())
            found[row, int(last)] = torch.tensor(0.5).log()
        return found


def method_with(*overrides: str, max_length: int = 100, sampler: Any = None) -> Any:
    wanted = ["recipe=ovd", f"seed={SEED}", f"method.template='{TEMPLATE}'", *overrides]
    models = SimpleNamespace(candidate_log_probs=Teacher())
    return made(wanted, given_with(Characters(), max_length=max_length), readers=models, sampler=sampler or Sampler())


def test_the_teacher_sees_problem_solution_and_response():
    method = method_with()
    found, metrics = method._scores(rollouts("why 7$", "6$"))
    assert method.tools.readers.candidate_log_probs.questions == ["2+2/=4./why 7?:", "2+2/=4./6?:"]
    assert found == [7.0, 6.0]
    assert metrics == pytest.approx({"verbal/score_mean": 6.5, "verbal/digit_mass": 0.5})


def test_a_response_that_is_too_long_loses_its_beginning():
    method = method_with("rollout.max_new_tokens=2", max_length=14)
    method._scores(rollouts("0123456789$"))
    assert method.tools.readers.candidate_log_probs.questions == ["2+2/=4./789?:"]


def test_a_ninth_of_the_score_is_the_reward():
    rewarded, _ = method_with("method.use=reward").rewarded(rollouts("9$", "3$"))
    assert [one.reward for one in rewarded] == pytest.approx([1.0, 1 / 3])


class Sampler:
    """A sampler whose responses are right at even calls of one request; it keeps the requests."""

    def __init__(self) -> None:
        self.requests: list[Request] = []

    def update_weights(self, step: int) -> None:
        assert step == STEP

    def sleep(self) -> None:
        """Give back nothing."""

    def generate(self, requests: Sequence[Request], params: Any) -> list[Response]:
        self.requests += requests
        return [response("4 new$" if i % 2 == 0 else "5 new$") for i in range(len(requests))]


def selected(given: Sequence[Rollout], threshold: float = 5.0) -> tuple[list[Rollout], Any, Sampler]:
    sampler = Sampler()
    chosen, metrics = method_with(f"method.threshold={threshold}", sampler=sampler).select(STEP, given)
    return chosen, metrics, sampler


def test_a_low_score_replaces_a_response_by_one_behind_the_privileged_prompt():
    chosen, metrics, sampler = selected(rollouts("4 so 8$", "5 so 2$", "5 so 5$", "5 so 0$"))
    assert [text(one) for one in chosen] == ["4 so 8$", "4 new$", "5 so 5$", "5 new$"]
    assert [one.reward for one in chosen] == [1.0, 1.0, 0.0, 0.0]
    assert [request.prompt for request in sampler.requests] == [PAIR.teacher_prompt] * 2
    assert [request.seed for request in sampler.requests] == [sample_seed(SEED, STEP, "verbal/a", i) for i in (0, 1)]
    assert chosen[1].response.sampled_log_probs == [-2.0] * 6 and chosen[1].prompts == PAIR
    assert (metrics["verbal/auroc"], metrics["verbal/filters"], metrics["verbal/replaced"]) == (1.0, 1.0, 0.5)
    assert method_with().warnings(metrics) == []


@pytest.mark.parametrize(
    ("max_length", "kept", "first"), [(100, "a8;b9;", "a8;b9;4 new"), (22, "a8;", "a8;4 new$"), (19, "", "4 new$")]
)
def test_a_replaced_response_keeps_its_beginning_up_to_the_last_good_step(max_length, kept, first):
    given = rollouts("4 so 8$", "a8;b9;c1;d2$", "a3;b6$", "a1$", "c7;")
    sampler = Sampler()
    options = ["method.step_separator=';'", "rollout.max_new_tokens=11"]
    chosen, metrics = method_with(*options, max_length=max_length, sampler=sampler).select(STEP, given)
    prompts = ["".join(map(chr, request.prompt)) for request in sampler.requests]
    teacher_prompt = "".join(map(chr, PAIR.teacher_prompt))
    assert len(teacher_prompt) == 8 and prompts == [teacher_prompt + kept, teacher_prompt]
    assert [text(one) for one in chosen] == ["4 so 8$", first, "a3;b6$", "5 new$", "c7;"]
    continued = chosen[1].response
    assert continued.sampled_log_probs == [-2.0] * len(first) and continued.log_probs == [-1.0] * len(first)
    assert continued.finish_reason == ("stop" if first.endswith("$") else "length")
    assert metrics["verbal/continued"] == (0.5 if kept else 0) and metrics["verbal/replaced"] == 0.4


@pytest.mark.parametrize(
    ("given", "words"),
    [
        (rollouts("4 so 2$", "5 so 8$"), "got an AUROC of 0.00"),
        (rollouts("4 so 2$", "5 so 2$"), "got an AUROC of 0.50"),
        (rollouts("5 so 2$", "5 so 8$"), "got responses of one kind only"),
    ],
)
def test_scores_that_do_not_tell_right_from_wrong_do_not_filter(given, words):
    chosen, metrics, sampler = selected(given)
    assert chosen == given and not sampler.requests
    assert (metrics["verbal/filters"], metrics["verbal/replaced"]) == (0.0, 0.0)
    [warning] = method_with().warnings(metrics)
    assert words in warning


SHARES = (0.02, 0.03, 0.05, 0.10, 0.15, 0.20, 0.20, 0.15, 0.07, 0.03)


def test_the_score_of_the_worked_example():
    log_probs = torch.tensor([SHARES], dtype=torch.float64).log()
    assert verbal_scores(log_probs).item() == pytest.approx(5.11, abs=1e-12)
    assert int(log_probs.argmax()) == 5


def test_the_mass_of_other_tokens_does_not_count():
    rare = torch.tensor([SHARES], dtype=torch.float64).log() - 40.0
    sure = torch.full((1, 10), -math.inf, dtype=torch.float64)
    sure[0, 9] = -3.0
    assert verbal_scores(torch.cat([rare, sure])).tolist() == pytest.approx([5.11, 9.0], abs=1e-12)


@pytest.mark.parametrize(
    ("scores", "right", "expected"),
    [
        ([1.0, 2.0, 3.0, 4.0], [False, False, True, True], 1.0),
        ([4.0, 3.0, 2.0, 1.0], [False, False, True, True], 0.0),
        ([1.0, 3.0, 2.0, 3.0], [False, False, True, True], 0.625),
        ([5.0, 5.0], [False, True], 0.5),
        ([5.0, 6.0], [True, True], None),
        ([], [], None),
    ],
)
def test_the_area_counts_ordered_pairs(scores, right, expected):
    assert auroc(scores, right) == expected
