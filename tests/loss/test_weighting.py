# Copyright (c) 2026 the megatron_selfdistill authors. Apache-2.0.
"""Truncated importance weights."""

from __future__ import annotations

import torch

from megatron_selfdistill.loss.weighting import TruncatedImportance


def test_weights_are_the_ratio_of_probabilities_up_to_the_cap_in_the_rows_order():
    p = torch.tensor([0.5, 0.2, 0.9, 0.01], dtype=torch.float64)
    mu = torch.tensor([0.25, 0.4, 0.1, 0.01], dtype=torch.float64)
    rows = torch.tensor([2, 0, 3, 1])  # rows are packed in another order than the responses
    weights = TruncatedImportance(mu.log(), cap=3.0)(p[rows].log().float(), rows)
    torch.testing.assert_close(weights, torch.tensor([3.0, 2.0, 1.0, 0.5]))


def test_no_gradient_flows_through_a_weight():
    log_p = torch.tensor([-1.0], requires_grad=True)
    assert not TruncatedImportance(torch.tensor([-2.0]))(log_p, torch.tensor([0])).requires_grad
