# Copyright (c) 2026 the megatron_selfdistill authors. Apache-2.0.
"""A step with controls or a shared anchor is alike in every layout, with the loss and gradient of the definition."""

from __future__ import annotations

import dataclasses

import anchored
import pytest
from anchored import ANCHORED, LAYOUTS, ORDERS, OUTPUT_LAYERS
from layouts import Case, Outcomes
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
    "a share of the reference": dataclasses.replace(OF_STUDENT, target=Target(anchor=0.25, num_controls=2)),
    "a share without controls": dataclasses.replace(OF_STUDENT, target=Target(anchor=0.25)),
    "one k for the batch": dataclasses.replace(ANCHORED, target=Target("batch", k=1.4, anchor=0.25, num_controls=2)),
    "soft cap": dataclasses.replace(OF_STUDENT, soft_cap=3.0),
    "two terms": dataclasses.replace(OF_STUDENT, two_terms=True),
}
QUICK = ["TP2+SP", "PP2xVPP2", "CP2"]
QUICK_CASES = ["student", "one control", "reference", "a share of the reference"]


@pytest.fixture(scope="module")
def outcomes(ranks) -> Outcomes:
    """Return outcomes, of which the quick ones of one rank have run in one call."""
    found = Outcomes(ranks)
    found.of([CASES[name] for name in QUICK_CASES])
    return found


@combinations(
    name=list(LAYOUTS),
    own=CASES,
    order=ORDERS,
    output_layer=OUTPUT_LAYERS,
    quick={"name": QUICK, "own": QUICK_CASES},
    strength=1,
    full_strength=2,
    valid=lambda own, output_layer, **_: anchored.is_possible(own, output_layer),
)
def test_gradients_equal_those_of_one_rank(outcomes, name, own, order, output_layer):
    anchored.assert_equals_one_rank(outcomes, name, own, order, output_layer)


@combinations(
    name=[name for name, case in CASES.items() if not case.two_terms], quick={"name": QUICK_CASES}, strength=1
)
def test_loss_and_gradient_of_a_step_are_those_of_the_definition(ranks, outcomes, name):
    anchored.assert_equals_definition(ranks, outcomes, CASES[name])


def test_the_statistics_of_the_teacher_are_those_of_a_step_without_controls(outcomes):
    without = dataclasses.replace(OF_STUDENT, target=Target(anchor="student"))
    assert outcomes(OF_STUDENT)[0].teacher_entropy == pytest.approx(outcomes(without)[0].teacher_entropy, rel=1e-6)
    assert outcomes(OF_STUDENT)[0].loss != pytest.approx(outcomes(without)[0].loss, rel=0.05)
