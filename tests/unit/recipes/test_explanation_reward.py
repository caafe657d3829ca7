# Copyright (c) 2026 the megatron_selfdistill authors. Apache-2.0.
"""The reward of an explanation is RLT's: values, published constants, and the direction of every term."""

from __future__ import annotations

import dataclasses

import pytest
import torch
from torch import Tensor

from megatron_selfdistill.recipes.explanation_reward import TEMPERATURE, explanation_reward


def log_probs(*values: float) -> Tensor:
    return torch.tensor(values, dtype=torch.float64)


SOLUTION = log_probs(-0.2, -1.5, -0.1)
POLICY = log_probs(-0.3, -0.1, -0.9, -0.2)
STUDENT = log_probs(-0.5, -2.1, -0.8, -0.2)


def test_the_reward_with_the_published_constants():
    reward = explanation_reward(SOLUTION, POLICY, STUDENT, has_closing_tag=True)
    assert (reward.solution, reward.divergence) == pytest.approx((-0.615, 0.545), abs=1e-12)
    assert reward.total == pytest.approx(-2.25, abs=1e-12)
    without = explanation_reward(SOLUTION, POLICY, STUDENT, has_closing_tag=False)
    assert without.total == pytest.approx(-3.25, abs=1e-12)
    assert dataclasses.replace(without, has_closing_tag=True) == reward
    assert TEMPERATURE == 0.7


def test_every_constant_counts():
    options = {"alpha": 0.5, "ratio_weight": 2.0, "missing_tag_penalty": 0.25}
    reward = explanation_reward(SOLUTION, POLICY, STUDENT, has_closing_tag=False, **options)
    solution, divergence = -0.6 + 0.5 * -1.5, 0.525 + 0.5 * 2.0
    assert (reward.solution, reward.divergence) == pytest.approx((solution, divergence), abs=1e-12)
    assert reward.total == pytest.approx(solution - 2 * divergence - 0.25, abs=1e-12)


@pytest.mark.parametrize(
    ("changed", "sign"),
    [
        ({"solution": SOLUTION + 0.1}, 1),
        ({"student": STUDENT + 0.1}, 1),
        ({"policy": POLICY + 0.1}, -1),
        # The least likely token and the largest ratio count beside the means, which stay as they are.
        ({"solution": SOLUTION + log_probs(0.1, -0.1, 0.0)}, -1),
        ({"student": STUDENT + log_probs(0.1, -0.1, 0.0, 0.0)}, -1),
    ],
)
def test_the_reward_rises_with_what_the_student_foresees(changed, sign):
    arrays = {"solution": SOLUTION, "policy": POLICY, "student": STUDENT}
    before = explanation_reward(*arrays.values(), has_closing_tag=True).total
    after = explanation_reward(*(arrays | changed).values(), has_closing_tag=True).total
    assert sign * (after - before) > 1e-4


def test_sums_are_float64_also_for_other_dtypes():
    few = log_probs(-0.1, -3e4, -0.3).float()
    wanted = sum(few.tolist()) / 3 + 0.01 * few.min().item()
    reward = explanation_reward(few, POLICY.float(), STUDENT.float(), has_closing_tag=True)
    assert reward.solution == pytest.approx(wanted, rel=1e-12)
    assert (few.mean() + 0.01 * few.min()).item() != pytest.approx(wanted, rel=1e-12)


def test_arrays_that_do_not_fit_are_refused():
    with pytest.raises(ValueError, match=r"at least one token each, got 0 and 4 tokens; leave the sample out"):
        explanation_reward(SOLUTION[:0], POLICY, STUDENT, has_closing_tag=True)
    with pytest.raises(ValueError, match=r"at least one token each, got 3 and 0 tokens"):
        explanation_reward(SOLUTION, POLICY[:0], STUDENT[:0], has_closing_tag=True)
    with pytest.raises(ValueError, match=r"the same explanation .* got shapes \[4\] and \[3\]"):
        explanation_reward(SOLUTION, POLICY, STUDENT[:3], has_closing_tag=True)
