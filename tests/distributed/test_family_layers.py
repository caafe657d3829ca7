# Copyright (c) 2026 the megatron_selfdistill authors. Apache-2.0.
"""The layers that only some families have, and how much a model amplifies the rounding of its weights."""

from __future__ import annotations

from typing import Any

import pytest
from conditioning import AMPLIFICATION, OTHERWISE, amplification
from layouts import Case
from models import KINDS
from parity import case_of, compare, reference_of
from tiers import combinations

GATED = {"moe_shared_expert_intermediate_size": 24, "moe_shared_expert_gate": True}
FEATURES: dict[str, dict[str, Any]] = {
    "norms over all heads": {"qk_layernorm_all_heads": True},
    "a layer without rope": {"transformer": {"no_rope_freq": [0, 1]}},
    "a gated shared expert": {"transformer": GATED},
}
LAYOUTS = {
    "norms over all heads": ("TP2", "TP2+SP", "CP2xTP2+SP", "PP2"),
    "a layer without rope": ("CP2", "PP2", "TP2+SP"),
    "a gated shared expert": ("EP2", "EP2xTP2+SP", "EP2xPP2"),
}


@combinations(
    feature=list(FEATURES),
    layout=sorted({layout for layouts in LAYOUTS.values() for layout in layouts}),
    valid=lambda feature, layout: layout in LAYOUTS[feature],
    quick={"layout": ["TP2+SP", "CP2", "EP2xTP2+SP"]},
    strength=1,
)
def test_the_gradients_are_those_of_one_rank(outcomes, feature, layout):
    case, world_size = case_of(layout, model_changes=FEATURES[feature])
    compare(outcomes(case, world_size), outcomes(reference_of(case)))


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
