# Copyright (c) 2026 the megatron_selfdistill authors. Apache-2.0.
"""The verbal score is the mean digit, and the AUROC is the share of pairs that it orders."""

from __future__ import annotations

import math

import pytest
import torch

from megatron_selfdistill.recipes.verbal_score import auroc, verbal_scores

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
