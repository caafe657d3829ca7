# Copyright (c) 2026 the megatron_selfdistill authors. Apache-2.0.
"""Teacher and reference are projected apart where one projection cannot serve both."""

from __future__ import annotations

import dataclasses

import pytest
from anchored import ANCHORED, APART, LAYOUTS, ORDERS, OUTPUT_LAYERS, loss_by_definition
from layouts import Case, Outcomes, worst_difference
from parity import TOLERANCE
from tiers import combinations

from megatron_selfdistill.loss.target import Target
from megatron_selfdistill.model.forward import Fusion

FUSED = {name: fusion for name, fusion in OUTPUT_LAYERS.items() if fusion is not None}


@pytest.fixture(scope="module")
def outcomes(ranks) -> Outcomes:
    """Return outcomes, of which those of one rank have run in one call."""
    found = Outcomes(ranks)
    found.of([ANCHORED, same_weights(), *APART.values()])
    return found


def same_weights() -> Case:
    """Return a case whose reference has chunks of its own, with the weights of the teacher."""
    return dataclasses.replace(ANCHORED, reference_copy=True, reference_seed=1)


def can_be(name: str, apart: str, order: dict, output_layer: Fusion | None) -> bool:
    """Return whether a case is possible: a layer that is not linear cannot be fused.

    The teachers differ in their weights only, so the current teacher runs in one order.
    """
    return (apart != "soft cap" or output_layer is None) and (apart != "current teacher" or not order)


@combinations(
    name=list(LAYOUTS),
    apart=list(APART),
    order=ORDERS,
    output_layer=OUTPUT_LAYERS,
    quick={"name": ["TP2+SP", "PP2xVPP2", "CP2"]},
    strength=1,
    full_strength=2,
    valid=can_be,
)
def test_gradients_equal_those_of_one_rank(outcomes, name, apart, order, output_layer):
    kind, cuts, world_size = LAYOUTS[name]
    case = dataclasses.replace(APART[apart], kind=kind)
    alone, expected, _ = outcomes(case)
    assert alone.loss > 0.02, "the target must differ from the student"
    got, gradients, _ = outcomes(dataclasses.replace(case, parallel=cuts, fusion=output_layer, **order), world_size)
    worst, where = worst_difference(gradients, expected)
    assert worst <= TOLERANCE, f"gradient of {where} differs by {worst:.1e}"
    assert got.loss == pytest.approx(alone.loss, rel=TOLERANCE)
    assert got.teacher_entropy == pytest.approx(alone.teacher_entropy, rel=TOLERANCE)


def test_two_projections_equal_one_projection_of_the_mixed_states(outcomes):
    """The target is the same for a reference with chunks of its own and the teacher's weights."""
    once, expected, _ = outcomes(ANCHORED)
    apart = [same_weights(), *(dataclasses.replace(same_weights(), fusion=fusion) for fusion in FUSED.values())]
    for twice, gradients, _ in outcomes.of(apart):
        assert worst_difference(gradients, expected)[0] <= TOLERANCE
        assert twice.loss == pytest.approx(once.loss, rel=1e-6)


def test_the_loss_of_a_step_is_that_of_the_definition(ranks, outcomes):
    (expected,) = ranks.run(losses_by_definition, list(APART.values()), world_size=1)
    for (got, *_), loss in zip(outcomes.of(list(APART.values())), expected, strict=True):
        assert got.loss == pytest.approx(loss, rel=1e-4)
    assert len({round(loss, 6) for loss in expected}) == len(APART), "the cases must differ"


def losses_by_definition(cases: list[Case]) -> list[float]:
    return [loss_by_definition(case) for case in cases]


def test_the_statistics_of_the_teacher_are_those_of_a_step_without_a_reference(outcomes):
    cases = [APART["current teacher"], APART["average teacher"]]
    without = [dataclasses.replace(case, target=Target(anchor="student"), reference_copy=False) for case in cases]
    for (got, *_), (expected, *_) in zip(outcomes.of(cases), outcomes.of(without), strict=True):
        assert got.teacher_entropy == pytest.approx(expected.teacher_entropy, rel=1e-6)
