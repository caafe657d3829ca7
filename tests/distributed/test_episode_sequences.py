# Copyright (c) 2026 the megatron_selfdistill authors. Apache-2.0.
"""The loss of an episode that is read once and its gradient are those of its turns, each read by itself."""

from __future__ import annotations

import dataclasses

import parity
import pytest
from layouts import Case, worst_difference
from models import parallel
from parity import bound
from tiers import combinations

from megatron_selfdistill.loss.target import Target

NAMES = ("one rank", "TP2+SP", "CP2", "PP2", "DP2", "CP2 experts")
LAYOUTS = {name: parity.LAYOUTS[name] for name in NAMES} | {"TP2 recurrent": ("gated_delta", parallel(tp=2), 2)}
STEPS = {
    "packed": {"max_tokens": 112},
    "rows": {"paired": True, "pair_order": "alternating"},
    "anchored": {"target": Target(), "max_tokens": 112},
    "two terms": {"two_terms": True},
}


QUICK = {"layout": ["CP2"], "step": ["packed"]}


@pytest.mark.full
@combinations(layout=list(LAYOUTS), step=list(STEPS), quick=QUICK, strength=1, full_strength=1)
def test_one_sequence_has_the_loss_and_the_gradient_of_its_turns(outcomes, layout, step, record_property):
    kind, cuts, world_size = LAYOUTS[layout]
    by_turn = Case(kind=kind, num_turns=4, extra_weightless=0, **STEPS[step])
    joined = dataclasses.replace(by_turn, joins_turns=True, parallel=cuts, extra_weightless=1)
    got, expected = outcomes(joined, world_size), outcomes(by_turn)
    assert expected[0].loss > 0.05, "the teacher must have something to say"
    worst, where = worst_difference(got[1], expected[1])
    record_property("worst relative difference", worst)
    assert worst <= bound(kind), f"gradient of {where} differs by {worst:.1e}"
    assert got[0].loss == pytest.approx(expected[0].loss, rel=bound(kind))
