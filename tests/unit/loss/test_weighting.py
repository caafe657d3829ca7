# Copyright (c) 2026 the megatron_selfdistill authors. Apache-2.0.
"""Truncated importance weights, and weights of logged turns."""

from __future__ import annotations

import math

import pytest
import torch

from megatron_selfdistill.loss.weighting import LikelyTurns, TruncatedImportance, down_weighted, dropped


def test_weights_are_the_ratio_of_probabilities_up_to_the_cap_in_the_rows_order():
    p = torch.tensor([0.5, 0.2, 0.9, 0.01], dtype=torch.float64)
    mu = torch.tensor([0.25, 0.4, 0.1, 0.01], dtype=torch.float64)
    rows = torch.tensor([2, 0, 3, 1])  # rows are packed in another order than the responses
    weights = TruncatedImportance(mu.log(), cap=3.0)(p[rows].log().float(), rows)
    torch.testing.assert_close(weights, torch.tensor([3.0, 2.0, 1.0, 0.5]))


def test_no_gradient_flows_through_a_weight():
    log_p = torch.tensor([-1.0], requires_grad=True)
    assert not TruncatedImportance(torch.tensor([-2.0]))(log_p, torch.tensor([0])).requires_grad


TURNS = torch.tensor([0, 0, 1, 1, 1, 2])
LOG_PROBS = torch.tensor([-1.0, -3.0, -4.0, -2.0, -6.0, -9.0])  # means -2, -4, -9


@pytest.mark.parametrize(
    ("weight", "expected"), [(dropped, [1, 0, 0]), (down_weighted, [1, math.exp(-1), math.exp(-6)])]
)
def test_the_tokens_of_a_turn_share_the_weight_of_its_mean_log_prob(weight, expected):
    weights = LikelyTurns(TURNS, 3, -3.0, weight, over_ranks=lambda sums: sums)
    rows = torch.tensor([5, 0, 3, 1, 4, 2])  # rows are packed in another order than the responses
    found = weights(LOG_PROBS[rows].requires_grad_(), rows)
    torch.testing.assert_close(found, torch.tensor(expected, dtype=torch.float32)[TURNS[rows]])
    assert not found.requires_grad


def test_a_turn_on_the_threshold_is_likely():
    assert LikelyTurns(TURNS[:2], 1, -2.0, dropped, lambda sums: sums)(LOG_PROBS[:2], torch.arange(2)).tolist() == [
        1,
        1,
    ]


def test_a_turn_that_is_spread_over_ranks_is_judged_as_a_whole():
    """This rank holds the first token of the turn; `over_ranks` returns the sums of all ranks."""
    everyone = torch.tensor([[-4.0], [2.0]], dtype=torch.float64)
    weights = LikelyTurns(TURNS[:2], 1, -1.5, dropped, over_ranks=lambda sums: everyone)
    assert weights(LOG_PROBS[:1], torch.tensor([0])).tolist() == [0], "-1 alone would be likely"
