# Copyright (c) 2026 the megatron_selfdistill authors. Apache-2.0.
"""Rewards of responses: numbers of a verifier or of the user's function, equal on all ranks."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from characters import ONE_RANK, Characters
from made_methods import response_of

from megatron_selfdistill.data.contexts import PromptPair
from megatron_selfdistill.data.problems import Problem
from megatron_selfdistill.errors import VerifierError
from megatron_selfdistill.evaluation.verify import exact_match
from megatron_selfdistill.rollout.base import Response
from megatron_selfdistill.sources.judge import Judge
from megatron_selfdistill.sources.rollouts import Rollout

pytestmark = pytest.mark.usefixtures("one_rank")
PROBLEM = Problem("p", ({"role": "user", "content": "1+7"},), "given", "8", "file.jsonl:1")


def answers(*texts: str) -> list[Rollout]:
    """Return one answer per text; a text without a stop token "$" is truncated."""
    return [Rollout(PROBLEM, PromptPair("p", [1], [2]), response_of(text)) for text in texts]


def test_the_verifier_rewards_with_one_and_zero_and_a_truncated_response_has_zero():
    assert Judge(exact_match, Characters(), ONE_RANK).rewards(answers("8$", "7$", "8")) == [1.0, 0.0, 0.0]


def test_a_function_of_the_user_rewards_in_place_of_the_verifier():
    judge = Judge(
        exact_match, Characters(), ONE_RANK, lambda text, problem: 0.25 * len(text) - (text != problem.answer)
    )
    assert judge.rewards(answers("8$", "777$", "8")) == [0.25, -0.25, 0.0]
    assert judge.right(answers("8$", "777$", "8")) == [True, False, False], "the verifier stays the judge of verdicts"


def test_a_reward_of_numpy_or_torch_counts_as_a_number_and_what_is_no_finite_number_is_refused():
    values = {"0": np.float32(0.5), "1": torch.tensor(0.5), "2": math.nan, "3": math.inf, "4": "1"}
    judge = Judge(exact_match, Characters(), ONE_RANK, lambda text, problem: values[text])
    assert judge.rewards(answers("0$", "1$")) == [0.5, 0.5]
    for text in "234":
        with pytest.raises(VerifierError, match=r"file.jsonl:1: "):
            judge.rewards(answers(f"{text}$"))


@pytest.mark.parametrize(("reward", "correct"), [(None, False), (0.49, False), (0.5, True), (-1.0, False), (3.0, True)])
def test_an_answer_is_right_from_a_reward_of_one_half(reward, correct):
    assert Rollout(PROBLEM, PromptPair("p", [1], [2]), Response([], [], [], "stop"), reward=reward).correct == correct
