# Copyright (c) 2026 the megatron_selfdistill authors. Apache-2.0.
"""OVD: the teacher's verbal score is the reward, or decides which responses are sampled anew behind the solution."""

from __future__ import annotations

import math
from collections.abc import Sequence
from types import SimpleNamespace
from typing import Any

import pytest
import tiny
import torch
from characters import text_of
from made_methods import TextSampler, made, response_of

from megatron_selfdistill.methods import ovd
from megatron_selfdistill.methods.ovd import auroc, verbal_scores
from megatron_selfdistill.rollout.base import Request, Response
from megatron_selfdistill.rollout.sampling import sample_seed
from megatron_selfdistill.sources.judge import Judge
from megatron_selfdistill.sources.rollouts import Rollout

PROBLEM, SEED, STEP = tiny.problem("2+2", "=4.", "4", id="a"), 7, 3


@pytest.fixture(autouse=True)
def alone(one_rank, monkeypatch):
    monkeypatch.setattr(ovd, "gather_items", lambda items, group=None: list(items))
    monkeypatch.setattr(Judge, "rewards", lambda self, rollouts: [float(text(one)[0] == "4") for one in rollouts])


def text(rollout: Rollout) -> str:
    return text_of(rollout.response.token_ids)


def rollouts(*texts: str) -> list[Rollout]:
    return [tiny.rollout(text, float(text[0] == "4"), problem=PROBLEM) for text in texts]


class Teacher:
    """Log-probs in which the last digit before the question mark is certain, with a mass of a half."""

    def __init__(self) -> None:
        self.questions: list[str] = []

    def __call__(self, prompts: Sequence[Sequence[int]], token_ids: Sequence[int]) -> torch.Tensor:
        assert list(token_ids) == list(map(ord, "0123456789"))
        self.questions += map(text_of, prompts)
        found = torch.full((len(prompts), 10), -torch.inf, dtype=torch.float64)
        for row, prompt in enumerate(map(text_of, prompts)):
            found[row, int(next(filter(str.isdigit, reversed(prompt))))] = math.log(0.5)
        return found


class Sampler(TextSampler):
    """A sampler whose responses are right at even calls of one request."""

    def generate(self, requests: Sequence[Request], params: Any) -> list[Response]:
        self.requests += requests
        return [response_of(f"{4 + i % 2} new$", [-2.0] * 6) for i in range(len(requests))]

    def sleep(self) -> None:
        pass


def method_with(*overrides: str, max_length: int = 100, sampler: Any = None) -> Any:
    wanted = ["recipe=ovd", f"seed={SEED}", "method.template='{problem}/{solution}/{response}?'", *overrides]
    readers = SimpleNamespace(candidate_log_probs=Teacher())
    return made(wanted, tiny.given(max_length), readers=readers, sampler=sampler or Sampler(STEP))


@pytest.mark.parametrize(
    ("overrides", "max_length", "texts", "questions", "scores"),
    [
        ([], 100, ["why 7$", "6$"], ["2+2/=4./why 7?:", "2+2/=4./6?:"], [7.0, 6.0]),
        (["rollout.max_new_tokens=2"], 14, ["0123456789$"], ["2+2/=4./789?:"], [9.0]),  # it loses its beginning
    ],
)
def test_the_teacher_sees_problem_solution_and_response(overrides, max_length, texts, questions, scores):
    method = method_with(*overrides, max_length=max_length)
    found, metrics = method._scores(rollouts(*texts))
    assert method.tools.readers.candidate_log_probs.questions == questions and found == scores
    assert metrics == pytest.approx({"verbal/score_mean": sum(scores) / len(scores), "verbal/digit_mass": 0.5})
    rewarded, _ = method_with("method.use=reward").rewarded(rollouts("9$", "3$"))
    assert [one.reward for one in rewarded] == pytest.approx([1.0, 1 / 3]), "a ninth of the score"


def selected(given: Sequence[Rollout], *overrides: str, **options: Any) -> tuple[list[Rollout], Any, list[Request]]:
    sampler = Sampler(STEP)
    chosen, metrics = method_with(*overrides, sampler=sampler, **options).select(STEP, given)
    return chosen, metrics, sampler.requests


def test_a_low_score_replaces_a_response_by_one_behind_the_privileged_prompt():
    given = rollouts("4 so 8$", "5 so 2$", "5 so 5$", "5 so 0$")
    chosen, metrics, requests = selected(given, "method.threshold=5")
    assert [text(one) for one in chosen] == ["4 so 8$", "4 new$", "5 so 5$", "5 new$"]
    assert [one.reward for one in chosen] == [1.0, 1.0, 0.0, 0.0]
    assert [request.prompt for request in requests] == [given[0].prompts.teacher_prompt] * 2
    assert [request.seed for request in requests] == [sample_seed(SEED, STEP, "verbal/a", i) for i in (0, 1)]
    assert chosen[1].response.sampled_log_probs == [-2.0] * 6 and chosen[1].prompts == given[0].prompts
    assert (metrics["verbal/auroc"], metrics["verbal/filters"], metrics["verbal/replaced"]) == (1.0, 1.0, 0.5)
    assert method_with().warnings(metrics) == []


@pytest.mark.parametrize(
    ("max_length", "kept", "first"), [(100, "a8;b9;", "a8;b9;4 new"), (22, "a8;", "a8;4 new$"), (19, "", "4 new$")]
)
def test_a_replaced_response_keeps_its_beginning_up_to_the_last_good_step(max_length, kept, first):
    given = rollouts("4 so 8$", "a8;b9;c1;d2$", "a3;b6$", "a1$", "c7;")
    options = ["method.step_separator=';'", "rollout.max_new_tokens=11"]
    chosen, metrics, requests = selected(given, *options, max_length=max_length)
    assert [text_of(request.prompt) for request in requests] == [f"2+2|=4.:{kept}", "2+2|=4.:"]
    assert [text(one) for one in chosen] == ["4 so 8$", first, "a3;b6$", "5 new$", "c7;"]
    continued = chosen[1].response
    assert continued.sampled_log_probs[len(kept) :] == [-2.0] * len(first.removeprefix(kept))
    assert len(continued.sampled_log_probs) == len(continued.log_probs) == len(first)
    assert continued.finish_reason == ("stop" if first.endswith("$") else "length")
    assert metrics["verbal/continued"] == (0.5 if kept else 0) and metrics["verbal/replaced"] == 0.4


@pytest.mark.parametrize(
    ("texts", "words"),
    [
        (["4 so 2$", "5 so 8$"], "AUROC of 0.00"),
        (["4 so 2$", "5 so 2$"], "AUROC of 0.50"),
        (["5 so 2$", "5 so 8$"], "one kind only"),
    ],
)
def test_scores_that_do_not_tell_right_from_wrong_do_not_filter(texts, words):
    given = rollouts(*texts)
    chosen, metrics, requests = selected(given, "method.threshold=5")
    assert chosen == given and not requests
    assert (metrics["verbal/filters"], metrics["verbal/replaced"]) == (0.0, 0.0)
    assert words in method_with().warnings(metrics)[0]


def test_the_score_is_that_of_the_worked_example_and_the_mass_of_other_tokens_does_not_count():
    shares = torch.tensor([[0.02, 0.03, 0.05, 0.10, 0.15, 0.20, 0.20, 0.15, 0.07, 0.03]], dtype=torch.float64).log()
    sure = torch.full((1, 10), -math.inf, dtype=torch.float64)
    sure[0, 9] = -3.0
    found = verbal_scores(torch.cat([shares, shares - 40.0, sure]))
    assert found.tolist() == pytest.approx([5.11, 5.11, 9.0], abs=1e-12)


@pytest.mark.parametrize(
    ("scores", "right", "expected"),
    [
        *(([1, 2, 3, 4], "0011", 1), ([4, 3, 2, 1], "0011", 0), ([1, 3, 2, 3], "0011", 0.625)),
        *(([5, 5], "01", 0.5), ([5, 6], "11", None), ([], "", None)),
    ],
)
def test_the_area_counts_ordered_pairs(scores, right, expected):
    assert auroc(scores, [kind == "1" for kind in right]) == expected
