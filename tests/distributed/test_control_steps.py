# Copyright (c) 2026 the megatron_selfdistill authors. Apache-2.0.
"""A step whose target has controls is alike in every layout, and its loss and gradient are those of the definition."""

from __future__ import annotations

import dataclasses

import pytest
import torch
from anchored import ANCHORED, LAYOUTS, ORDERS, OUTPUT_LAYERS, loss_and_gradient_by_definition
from layouts import Case, Outcomes, worst_difference
from parity import TOLERANCE
from tiers import combinations

from megatron_selfdistill.loss.target import Target

OF_STUDENT = Case(kind="shallow", target=Target(anchor="student", num_controls=2))
CASES = {
    "student": OF_STUDENT,
    "one control": dataclasses.replace(OF_STUDENT, target=Target(anchor="student", num_controls=1)),
    "reference": dataclasses.replace(ANCHORED, target=Target(num_controls=2)),
    "reference of its own": dataclasses.replace(ANCHORED, target=Target(num_controls=2), reference_copy=True),
    "average teacher": dataclasses.replace(OF_STUDENT, teacher="ema"),
    "current teacher": dataclasses.replace(OF_STUDENT, teacher="current"),
    "soft cap": dataclasses.replace(OF_STUDENT, soft_cap=3.0),
    "two terms": dataclasses.replace(OF_STUDENT, two_terms=True),
}
QUICK = ["TP2+SP", "PP2xVPP2", "CP2"]


@pytest.fixture(scope="module")
def outcomes(ranks) -> Outcomes:
    """Return outcomes, of which those of one rank have run in one call."""
    found = Outcomes(ranks)
    found.of(list(CASES.values()))
    return found


def possible(name: str, own: Case, order: dict, output_layer: object) -> bool:
    """Return whether a case is possible: only a linear layer is fused, and a kept gradient has no second term."""
    return not (own.soft_cap and output_layer) and not (own.two_terms and output_layer == OUTPUT_LAYERS["fused"])


@combinations(
    name=list(LAYOUTS),
    own=CASES,
    order=ORDERS,
    output_layer=OUTPUT_LAYERS,
    quick={"name": QUICK},
    strength=1,
    full_strength=2,
    valid=possible,
)
def test_gradients_equal_those_of_one_rank(outcomes, name, own, order, output_layer):
    kind, cuts, world_size = LAYOUTS[name]
    alone, expected, _ = outcomes(dataclasses.replace(own, kind=kind))
    assert alone.loss > 0.02, "the target must differ from the student"
    case = dataclasses.replace(own, kind=kind, parallel=cuts, fusion=output_layer, **order)
    got, gradients, _ = outcomes(case, world_size)
    worst, where = worst_difference(gradients, expected)
    assert worst <= TOLERANCE, f"gradient of {where} differs by {worst:.1e}"
    assert got.loss == pytest.approx(alone.loss, rel=TOLERANCE)
    assert got.teacher_entropy == pytest.approx(alone.teacher_entropy, rel=TOLERANCE)


@pytest.mark.parametrize("name", [name for name, case in CASES.items() if not case.two_terms])
def test_loss_and_gradient_of_a_step_are_those_of_the_definition(ranks, outcomes, name):
    ((loss, gradient),) = ranks.run(loss_and_gradient_by_definition, CASES[name], world_size=1)
    got, gradients, _ = outcomes(CASES[name])
    assert got.loss == pytest.approx(loss, rel=1e-4)
    torch.testing.assert_close(gradients["decoder.final_layernorm.weight"], gradient, rtol=1e-3, atol=1e-7)


def test_the_statistics_of_the_teacher_are_those_of_a_step_without_controls(outcomes):
    without = dataclasses.replace(OF_STUDENT, target=Target(anchor="student"))
    assert outcomes(OF_STUDENT)[0].teacher_entropy == pytest.approx(outcomes(without)[0].teacher_entropy, rel=1e-6)
    assert outcomes(OF_STUDENT)[0].loss != pytest.approx(outcomes(without)[0].loss, rel=0.05)
