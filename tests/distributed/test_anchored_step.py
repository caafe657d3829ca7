# Copyright (c) 2026 the megatron_selfdistill authors. Apache-2.0.
"""A step whose target mixes the teacher with a frozen reference has equal gradients in every layout."""

from __future__ import annotations

import dataclasses

import models
import pytest
import torch
from layouts import Case, Outcomes, contexts, worst_difference
from models import parallel
from tiers import combinations

from megatron_selfdistill.config import ParallelConfig
from megatron_selfdistill.loss.target import Target, mixed_target
from megatron_selfdistill.model.build import build_chunks
from megatron_selfdistill.model.output_layer import Fusion

ANCHORED = Case(target=Target(anchor="reference", teacher_weight=0.5))
LAYOUTS: dict[str, tuple[str, ParallelConfig, int]] = {
    "TP2+SP": ("gqa", parallel(tp=2, sp=True), 2),
    "PP2 tied": ("tied", parallel(pp=2), 2),
    "PP2xVPP2": ("gqa", parallel(pp=2, vpp=2), 2),
    "CP2": ("gqa", parallel(cp=2), 2),
    "DP2": ("gqa", parallel(), 2),
    "EP2": ("moe", parallel(ep=2), 2),
    "CP2xPP2": ("gqa", parallel(cp=2, pp=2), 4),
    "EP2xTP2+SP": ("moe", parallel(ep=2, tp=2, etp=1, sp=True), 2),
}
QUICK = ["TP2+SP", "PP2xVPP2", "CP2"]
ORDERS = {"teacher first": {}, "alternating": {"pair_order": "alternating", "paired": True}}
OUTPUT_LAYERS = {"materialised": None, "fused": Fusion("keep_gradient", 4), "low memory": Fusion("low_memory", 4)}


@pytest.fixture(scope="module")
def outcomes(ranks) -> Outcomes:
    return Outcomes(ranks)


@combinations(name=list(LAYOUTS), order=ORDERS, output_layer=OUTPUT_LAYERS, quick={"name": QUICK}, strength=1)
def test_gradients_equal_those_of_one_rank(outcomes, name, order, output_layer):
    kind, cuts, world_size = LAYOUTS[name]
    alone, expected, _ = outcomes(dataclasses.replace(ANCHORED, kind=kind))
    assert alone.loss > 0.02, "the target must differ from the student"
    got, gradients, _ = outcomes(
        dataclasses.replace(ANCHORED, kind=kind, parallel=cuts, fusion=output_layer, **order), world_size
    )
    worst, where = worst_difference(gradients, expected)
    assert worst <= 1e-5, f"gradient of {where} differs by {worst:.1e}"
    assert got.loss == pytest.approx(alone.loss, rel=1e-5)


def test_the_reference_changes_the_gradient(outcomes):
    _, with_reference, _ = outcomes(ANCHORED)
    _, without, _ = outcomes(dataclasses.replace(ANCHORED, target=Target(teacher_weight=0.5)))
    assert worst_difference(without, with_reference)[0] > 0.1


def loss_by_definition(case: Case) -> float:
    """Return the mean reverse KL from whole rows of logits in float64, one context after the other."""
    model = models.model_config(case.kind)
    student, grid = models.build(model, ParallelConfig())
    teacher = build_chunks(model, student[0].config, grid, models.VOCAB_SIZE)
    models.fill_from_names(teacher, seed=1)
    losses = []
    for context in contexts():
        rows = []
        for chunk, prompt in (
            (student[0], context.student_prompt),
            (teacher[0], context.teacher_prompt),
            (teacher[0], context.student_prompt),
        ):
            tokens = torch.tensor([prompt + context.response])
            with torch.no_grad():
                logits = chunk(tokens, torch.arange(tokens.size(1))[None], None)[0, :, : models.VOCAB_SIZE]
            rows.append(logits[len(prompt) - 1 : -1].double())
        s, t, r = rows
        log_p, log_q = s.log_softmax(-1), mixed_target(s, t, case.target, r).log_q
        losses.append((log_p.exp() * (log_p - log_q)).sum(-1))
    return float(torch.cat(losses).mean())


@pytest.mark.parametrize("kind", ["gqa", "tied"])
def test_the_loss_of_a_step_is_that_of_the_definition(ranks, outcomes, kind):
    case = dataclasses.replace(ANCHORED, kind=kind)
    (expected,) = ranks.run(loss_by_definition, case, world_size=1)
    assert outcomes(case)[0].loss == pytest.approx(expected, rel=1e-4)
