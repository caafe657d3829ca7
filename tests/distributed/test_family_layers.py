# Copyright (c) 2026 the megatron_selfdistill authors. Apache-2.0.
"""The layers that only some families have give a step the same gradient in every layout."""

from __future__ import annotations

from typing import Any

import pytest
from layouts import Outcomes
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


@pytest.fixture(scope="module")
def outcomes(ranks):
    """Return the outcomes that the tests of this file have in common."""
    return Outcomes(ranks)


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
