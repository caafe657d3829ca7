# Copyright (c) 2026 the megatron_selfdistill authors. Apache-2.0.
"""The bounds of the comparisons of layouts follow from how much the models amplify the rounding of their weights."""

from __future__ import annotations

import pytest
from conditioning import AMPLIFICATION, OTHERWISE, amplification
from layouts import Case
from models import KINDS

pytestmark = pytest.mark.full


@pytest.mark.parametrize(
    "kind", [pytest.param(kind, marks=() if kind == "gqa" else pytest.mark.full) for kind in KINDS]
)
def test_a_model_amplifies_a_change_of_its_weights_as_its_bound_says(ranks, kind):
    """The measurement is that of exact arithmetic, up to the curvature: it does not depend on the machine."""
    stated = AMPLIFICATION.get(kind, OTHERWISE)
    measured, _ = amplification(ranks, Case(kind=kind), seed=1)
    assert stated / 4 <= measured <= 2 * stated


@pytest.mark.full
def test_the_decay_of_a_gated_delta_net_has_the_gradient_that_amplifies_most(ranks):
    """Its gradient is ill-conditioned: a rounding of the weights moves it 10 times as far as any of another model."""
    measured, where = amplification(ranks, Case(kind="gated_delta"), seed=3)
    assert where.endswith("self_attention.A_log") and measured > 5 * OTHERWISE
