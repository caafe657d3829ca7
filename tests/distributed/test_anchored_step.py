# Copyright (c) 2026 the megatron_selfdistill authors. Apache-2.0.
"""A step whose target has a reference is alike in every layout."""

from __future__ import annotations

import dataclasses
from typing import Any

import anchored
import pytest
from anchored import ANCHORED, APART, LAYOUTS, ORDERS, OUTPUT_LAYERS
from layouts import Case, Outcomes, worst_difference
from parity import TOLERANCE
from tiers import combinations

from megatron_selfdistill.loss.target import Target
from megatron_selfdistill.model.forward import Fusion

CASES = {
    "one projection": ANCHORED,
    **APART,
    "two terms": dataclasses.replace(ANCHORED, divergence="forward_kl", two_terms=True),
}
QUICK = ["TP2+SP", "PP2xVPP2", "CP2"]


@pytest.fixture(scope="module")
def outcomes(ranks) -> Outcomes:
    """Return outcomes, of which those of one rank have run in one call."""
    found = Outcomes(ranks)
    found.of([same_weights(), *CASES.values()])
    return found


def same_weights() -> Case:
    """Return a case whose reference has chunks of its own, with the weights of the teacher."""
    return dataclasses.replace(ANCHORED, reference_copy=True, reference_seed=1)


def shows_more(name: str, own: Case, order: dict[str, Any], output_layer: Fusion | None) -> bool:
    """Return whether a case is possible, and shows more than the others do.

    A layer that is not linear cannot be fused, and a kept gradient has no second term.  The current teacher runs in few
    layouts and one order.
    """
    is_small = own.teacher == "current"
    return anchored.is_possible(own, output_layer) and (not is_small or (name in QUICK and not order))


@combinations(
    name=list(LAYOUTS),
    own=CASES,
    order=ORDERS,
    output_layer=OUTPUT_LAYERS,
    quick={"name": QUICK},
    strength=1,
    full_strength=2,
    valid=shows_more,
)
def test_gradients_equal_those_of_one_rank(outcomes, name, own, order, output_layer):
    anchored.assert_equals_one_rank(outcomes, name, own, order, output_layer, nan_ok=True)


def test_what_a_case_has_of_its_own_changes_the_gradient(outcomes):
    for case, change in (
        (ANCHORED, {"target": Target(teacher_weight=0.5, anchor="student")}),
        (CASES["two terms"], {"two_terms": False}),
    ):
        _, gradients, _ = outcomes(case)
        _, without, _ = outcomes(dataclasses.replace(case, **change))
        assert worst_difference(without, gradients)[0] > 0.05


def test_two_projections_equal_one_projection_of_the_mixed_states(outcomes):
    """The target is the same for a reference with chunks of its own and the teacher's weights."""
    once, expected, _ = outcomes(ANCHORED)
    apart = [dataclasses.replace(same_weights(), fusion=fusion) for fusion in OUTPUT_LAYERS.values()]
    for twice, gradients, _ in outcomes.of(apart):
        assert worst_difference(gradients, expected)[0] <= TOLERANCE
        assert twice.loss == pytest.approx(once.loss, rel=1e-6)


@pytest.mark.parametrize("name", [name for name, case in CASES.items() if not case.two_terms])
def test_loss_and_gradient_of_a_step_are_those_of_the_definition(ranks, outcomes, name):
    anchored.assert_equals_definition(ranks, outcomes, CASES[name])


def test_the_statistics_of_the_teacher_are_those_of_a_step_without_a_reference(outcomes):
    cases = [APART["current teacher"], APART["average teacher"]]
    without = [dataclasses.replace(case, target=Target(anchor="student"), reference_copy=False) for case in cases]
    for (got, *_), (expected, *_) in zip(outcomes.of(cases), outcomes.of(without), strict=True):
        assert got.teacher_entropy == pytest.approx(expected.teacher_entropy, rel=1e-6)
