# Copyright (c) 2026 the megatron_selfdistill authors. Apache-2.0.
"""A step whose target mixes the teacher with a frozen reference has equal gradients in every layout."""

from __future__ import annotations

import dataclasses

import pytest
from anchored import ANCHORED, LAYOUTS, ORDERS, OUTPUT_LAYERS, loss_by_definition
from layouts import Outcomes, worst_difference
from parity import TOLERANCE
from tiers import combinations

from megatron_selfdistill.loss.target import Target

QUICK = ["TP2+SP", "PP2xVPP2"]  # test_two_projections.py has CP2


@pytest.fixture(scope="module")
def outcomes(ranks) -> Outcomes:
    return Outcomes(ranks)


@combinations(
    name=list(LAYOUTS), order=ORDERS, output_layer=OUTPUT_LAYERS, quick={"name": QUICK}, strength=1, full_strength=2
)
def test_gradients_equal_those_of_one_rank(outcomes, name, order, output_layer):
    kind, cuts, world_size = LAYOUTS[name]
    alone, expected, _ = outcomes(dataclasses.replace(ANCHORED, kind=kind))
    assert alone.loss > 0.02, "the target must differ from the student"
    got, gradients, _ = outcomes(
        dataclasses.replace(ANCHORED, kind=kind, parallel=cuts, fusion=output_layer, **order), world_size
    )
    worst, where = worst_difference(gradients, expected)
    assert worst <= TOLERANCE, f"gradient of {where} differs by {worst:.1e}"
    assert got.loss == pytest.approx(alone.loss, rel=TOLERANCE)


def test_the_reference_changes_the_gradient(outcomes):
    _, with_reference, _ = outcomes(ANCHORED)
    _, without, _ = outcomes(dataclasses.replace(ANCHORED, target=Target(teacher_weight=0.5, anchor="student")))
    assert worst_difference(without, with_reference)[0] > 0.1


@pytest.mark.parametrize("kind", ["shallow", pytest.param("tied", marks=pytest.mark.full)])
def test_the_loss_of_a_step_is_that_of_the_definition(ranks, outcomes, kind):
    case = dataclasses.replace(ANCHORED, kind=kind)
    (expected,) = ranks.run(loss_by_definition, case, world_size=1)
    assert outcomes(case)[0].loss == pytest.approx(expected, rel=1e-4)
