# Copyright (c) 2026 the megatron_selfdistill authors. Apache-2.0.
"""A step with a reference, controls or a shared anchor is alike in every layout, as its definition says."""

from __future__ import annotations

import dataclasses
from typing import Any

import pytest
import torch
from anchored import ANCHORED, loss_and_gradient_by_definition
from layouts import Case, Outcomes, worst_difference
from parity import TOLERANCE, case_of
from tiers import combinations

from megatron_selfdistill.loss.target import Target
from megatron_selfdistill.model.forward import Fusion

OF_STUDENT = Case(kind="shallow", target=Target(anchor="student", num_controls=2))
CASES = {
    "one projection": ANCHORED,
    "average teacher": dataclasses.replace(ANCHORED, teacher="ema", reference_copy=True),
    "current teacher": dataclasses.replace(ANCHORED, teacher="current", reference_copy=True),
    "soft cap": dataclasses.replace(ANCHORED, soft_cap=3.0),  # one projection cannot serve teacher and reference
    "two terms": dataclasses.replace(ANCHORED, divergence="forward_kl", two_terms=True),
    "controls": OF_STUDENT,
    "one control": dataclasses.replace(OF_STUDENT, target=Target(anchor="student", num_controls=1)),
    "reference and controls": dataclasses.replace(ANCHORED, target=Target(num_controls=2)),
    "reference of its own": dataclasses.replace(ANCHORED, target=Target(num_controls=2), reference_copy=True),
    "controls of an average": dataclasses.replace(OF_STUDENT, teacher="ema"),
    "controls of the student": dataclasses.replace(OF_STUDENT, teacher="current"),
    "a share of the reference": dataclasses.replace(OF_STUDENT, target=Target(anchor=0.25, num_controls=2)),
    "a share without controls": dataclasses.replace(OF_STUDENT, target=Target(anchor=0.25)),
    "one k for the batch": dataclasses.replace(ANCHORED, target=Target("batch", k=1.4, anchor=0.25, num_controls=2)),
    "soft cap and controls": dataclasses.replace(OF_STUDENT, soft_cap=3.0),
    "two terms and controls": dataclasses.replace(OF_STUDENT, two_terms=True),
}
LAYOUTS = ["TP2+SP", "PP2xVPP2", "CP2", "PP2 tied", "DP2", "EP2", "CP2xPP2", "EP2xTP2+SP"]
ORDERS = {"teacher first": {}, "alternating": {"pair_order": "alternating", "paired": True}}
OUTPUT_LAYERS = {"materialised": None, "fused": Fusion("keep_gradient", 4), "low memory": Fusion("low_memory", 4)}
QUICK = [
    *("one projection", "average teacher", "current teacher", "soft cap", "two terms"),
    *("one control", "reference and controls", "a share of the reference"),
]


@pytest.fixture(scope="module")
def outcomes(ranks) -> Outcomes:
    """Return outcomes, of which the quick ones of one rank have run in one call."""
    found = Outcomes(ranks)
    found.of([CASES[name] for name in QUICK])
    return found


def is_possible(own: Case, output_layer: Fusion | None, **_: Any) -> bool:
    """Return whether the output layer can compute a case: only a linear one is fused, a kept gradient has one term."""
    return not (own.soft_cap and output_layer) and not (own.two_terms and output_layer == OUTPUT_LAYERS["fused"])


AXES = {"name": LAYOUTS, "own": CASES, "order": ORDERS, "output_layer": OUTPUT_LAYERS}


@combinations(**AXES, quick={"name": LAYOUTS[:3], "own": QUICK[1::2]}, strength=1, full_strength=2, valid=is_possible)
def test_gradients_equal_those_of_one_rank(outcomes, name, own, order, output_layer):
    case, world_size = case_of(name)
    case = dataclasses.replace(own, kind=case.kind, parallel=case.parallel, fusion=output_layer, **order)
    alone, expected, _ = outcomes(dataclasses.replace(own, kind=case.kind))
    assert alone.loss > 0.02, "the target must differ from the student"
    got, gradients, _ = outcomes(case, world_size)
    worst, where = worst_difference(gradients, expected)
    assert worst <= TOLERANCE, f"gradient of {where} differs by {worst:.1e}"
    assert got.loss == pytest.approx(alone.loss, rel=TOLERANCE)
    assert got.teacher_entropy == pytest.approx(alone.teacher_entropy, rel=TOLERANCE, nan_ok=own.target.is_anchored)


@combinations(name=list(CASES), quick={"name": QUICK}, strength=1)
def test_loss_and_gradient_of_a_step_are_those_of_the_definition(ranks, outcomes, name):
    ((loss, gradient),) = ranks.run(loss_and_gradient_by_definition, CASES[name], world_size=1)
    got, gradients, _ = outcomes(CASES[name])
    assert got.loss == pytest.approx(loss, rel=1e-4)
    torch.testing.assert_close(gradients["decoder.final_layernorm.weight"], gradient, rtol=1e-3, atol=1e-7)
