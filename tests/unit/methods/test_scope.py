# Copyright (c) 2026 the megatron_selfdistill authors. Apache-2.0.
"""The weights of SCOPE as a pure function of arrays, against the numbers of the paper."""

from __future__ import annotations

import pytest
import torch
from term_arrays import signals, tensor

from megatron_selfdistill.methods.scope import scope


def perplexities(*values: float) -> list[float]:
    return (-tensor(*values).log()).tolist()


def test_scope_weighs_wrong_responses_by_the_teacher():
    """The numbers of the paper's figure 2."""
    terms = scope(signals([0, 0, 0], p=[0.0] * 3, q=perplexities(4.5, 2.9, 1.7)), weight=1.0, tau=1.0)
    assert terms.sampled_kl.tolist() == pytest.approx((0.192353, 0.298478, 0.509169), abs=1e-6)
    assert not terms.advantage.any()


@pytest.mark.parametrize(("tau", "expected"), [(1.0, (0.157895, 0.342105, 0.5)), (0.5, (0.063604, 0.298587, 0.637809))])
def test_scope_weighs_right_responses_by_the_student(tau, expected):
    """The numbers of the paper's figure 2."""
    terms = scope(signals([1, 1, 1], p=perplexities(1.2, 2.6, 3.8), q=[0.0] * 3), weight=1.0, tau=tau)
    assert terms.advantage.tolist() == pytest.approx(expected, abs=1e-6)
    assert not terms.sampled_kl.any()


def test_scope_weighs_within_groups_and_kinds_and_skips_responses_without_a_hint():
    mixed = signals(
        [1, 0, 0, 1, 1, 0],
        groups=[0, 0, 0, 0, 1, 1],
        lengths=[2, 1, 1, 1, 1, 1],
        hinted=[True, True, False, True, True, False],
        p=[-1.0, -3.0, 0.0, 0.0, -1.0, -5.0, 0.0],
        q=[0.0, 0.0, -2.0, -1.0, 0.0, 0.0, 0.0],
    )
    terms = scope(mixed, weight=1.0, tau=1.0)
    first = torch.softmax(tensor(2.0, 1.0), 0).tolist()  # mean log-probs -2 and -1 of the two right ones
    expected = [first[0], first[0], 0.0, 0.0, first[1], 1.0, 0.0]
    assert terms.advantage.tolist() == pytest.approx(expected, abs=1e-12)
    assert terms.sampled_kl.tolist() == [0.0, 0.0, 1.0, 0.0, 0.0, 0.0, 0.0]
