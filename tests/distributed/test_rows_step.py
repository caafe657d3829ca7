# Copyright (c) 2026 the megatron_selfdistill authors. Apache-2.0.
"""A step in which each context has a row of its own has the loss and the gradients of the packed step."""

from __future__ import annotations

import dataclasses

import pytest
from layouts import Outcomes
from parity import case_of, compare, reference_of
from tiers import combinations

from megatron_selfdistill.loss.target import Target
from megatron_selfdistill.model.output_layer import Fusion

LAYOUTS = ["one rank", "TP2", "TP2+SP", "PP2", "PP2xVPP2", "DP2", "EP2", "EP2xTP2+SP", "TP2xPP2+SP"]
ONE_PER_AXIS = ["TP2+SP", "PP2xVPP2", "DP2", "EP2"]
MAX_TOKENS = 150
"""Room for three rows, so that the seven contexts leave a row of the last microbatch empty."""


@pytest.fixture(scope="module")
def outcomes(ranks):
    """Return the outcomes that the tests of this file have in common."""
    return Outcomes(ranks)


@combinations(
    name=LAYOUTS,
    pair_order=["teacher_first", "alternating"],
    quick={"name": ONE_PER_AXIS},
    strength=1,
    full_strength=1,
)
def test_rows_have_the_gradients_of_packed_sequences(outcomes, name, pair_order, record_property):
    case, world_size = case_of(name, unpacked=True, pair_order=pair_order, paired=True, max_tokens=MAX_TOKENS)
    alone = reference_of(dataclasses.replace(case, unpacked=False, max_tokens=56))
    record_property("worst relative difference", compare(outcomes(case, world_size), outcomes(alone)))


@combinations(
    name=["TP2+SP", "PP2xVPP2", "DP2", "EP2", "TP2xPP2+SP"],
    anchor=["student", "reference"],
    fused=[None, "keep_gradient", "low_memory"],
    quick={"name": ["TP2+SP"]},
    strength=1,
    full_strength=2,
)
def test_rows_carry_the_states_of_teacher_and_reference_to_the_right_tokens(outcomes, name, anchor, fused):
    case, world_size = case_of(
        name,
        unpacked=True,
        max_tokens=MAX_TOKENS,
        target=Target(teacher_weight=0.6, anchor=anchor),
        reference_copy=anchor == "reference",
        fusion=fused and Fusion(fused, 5),
    )
    alone = reference_of(dataclasses.replace(case, unpacked=False, fusion=None, max_tokens=56))
    compare(outcomes(case, world_size), outcomes(alone))


def test_longer_rows_change_nothing(outcomes):
    """More padding behind each context."""
    case, _ = case_of("one rank", unpacked=True, max_tokens=MAX_TOKENS, seq_quantum=64)
    compare(outcomes(case), outcomes(dataclasses.replace(case, seq_quantum=None)))
