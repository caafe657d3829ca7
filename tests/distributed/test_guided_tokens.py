# Copyright (c) 2026 the megatron_selfdistill authors. Apache-2.0.
"""A step in which the tokens of guided problems have their own weight of the teacher and their own divergence."""

from __future__ import annotations

import dataclasses
from typing import Any

import models
import pytest
import torch
from anchored import rows_of
from layouts import Case, Outcomes, contexts_of, packed, reference, vocab_shard, worst_difference
from logit_pairs import divergence
from models import parallel
from parity import TOLERANCE
from tiers import combinations

from megatron_selfdistill.config import ParallelConfig
from megatron_selfdistill.data.packed_batch import PackingRules
from megatron_selfdistill.data.packing import pack
from megatron_selfdistill.loss.sharded import target_measures
from megatron_selfdistill.loss.target import Divergence, Target, mixed_target
from megatron_selfdistill.model.build import build_chunks, wrap_for_training
from megatron_selfdistill.model.forward import Fusion, unwrapped
from megatron_selfdistill.pipeline import schedule, token_losses
from megatron_selfdistill.pipeline.token_losses import GuidedTokens
from megatron_selfdistill.pipeline.token_measures import TokenMeasurement

W, GUIDED_W = 0.5, 2.0
ANCHORED = Target(anchor="reference", teacher_weight=W)
BOTH = Case(kind="shallow", target=ANCHORED, guided=GuidedTokens(GUIDED_W, Divergence("forward_kl")))
CASES = {
    "weight and divergence": BOTH,
    "weight": dataclasses.replace(BOTH, guided=GuidedTokens(GUIDED_W)),
    "weight, reference of its own": dataclasses.replace(BOTH, guided=GuidedTokens(GUIDED_W), reference_copy=True),
    "divergence": Case(
        kind="shallow",
        target=Target(teacher_weight=W, anchor="student"),
        guided=GuidedTokens(None, Divergence("jsd", 0.3)),
    ),
}
LAYOUTS: dict[str, tuple[str, ParallelConfig, int]] = {
    "TP2+SP": ("shallow", parallel(tp=2, sp=True), 2),
    "PP2": ("shallow", parallel(pp=2), 2),
    "CP2": ("shallow", parallel(cp=2), 2),
    "TP2 tied": ("tied", parallel(tp=2), 2),
    "PP2xVPP2": ("gqa", parallel(pp=2, vpp=2), 2),
    "DP2": ("shallow", parallel(), 2),
    "EP2": ("moe", parallel(ep=2), 2),
    "CP2xPP2": ("shallow", parallel(cp=2, pp=2), 4),
}
QUICK = ["TP2+SP", "PP2", "CP2"]
ORDERS = {"teacher first": {}, "alternating": {"pair_order": "alternating", "paired": True}}
OUTPUT_LAYERS = {"materialised": None, "fused": Fusion("keep_gradient", 4), "low memory": Fusion("low_memory", 4)}


@pytest.fixture(scope="module")
def outcomes(ranks) -> Outcomes:
    return Outcomes(ranks)


def is_new(name: str, own: Case, order: dict[str, Any], output_layer: Fusion | None) -> bool:
    """Return whether a case shows more than the others do.

    Weight and divergence together run in every layout and order; the other cases run in three layouts and one order.
    """
    return own == BOTH or (name in QUICK and not order)


@combinations(
    name=list(LAYOUTS),
    own=CASES,
    order=ORDERS,
    output_layer=OUTPUT_LAYERS,
    quick={"name": QUICK},
    strength=1,
    full_strength=2,
    valid=is_new,
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


@combinations(name=list(CASES), quick={"name": ["weight and divergence"]}, strength=1)
def test_guided_tokens_change_the_gradient(outcomes, name):
    case = CASES[name]
    _, gradients, _ = outcomes(case)
    for guided in (None, GuidedTokens()):
        _, without, _ = outcomes(dataclasses.replace(case, guided=guided))
        assert worst_difference(without, gradients)[0] > 0.05


def loss_and_gradient_by_definition(case: Case) -> tuple[float, torch.Tensor]:
    """Return the mean divergence from whole rows of logits in float64, one context after the other.

    The second result is its gradient to the weights of the final norm, which all tokens share.
    """
    model = models.model_config(case.kind)
    student, grid = models.build(model, ParallelConfig())
    teacher = build_chunks(model, student[0].config, grid, models.VOCAB_SIZE)
    models.fill_from_names(teacher, seed=1)
    frozen = teacher
    if case.reference_copy:
        frozen = build_chunks(model, student[0].config, grid, models.VOCAB_SIZE)
        models.fill_from_names(frozen, seed=case.reference_seed)
    losses = []
    for context in contexts_of(case):
        s, t, r = rows_of(context, student[0], teacher[0], frozen[0])
        target, kind = case.target, Divergence(case.divergence)
        if context.guided:
            if case.guided.teacher_weight is not None:
                target = dataclasses.replace(target, teacher_weight=case.guided.teacher_weight)
            kind = case.guided.divergence or kind
        r = r.detach() if target.is_anchored else None
        log_p, log_q = s.log_softmax(-1), mixed_target(s.detach(), t.detach(), target, r).log_q
        losses.append(divergence(log_p, log_q, kind))
    loss = torch.cat(losses).mean()
    weight = student[0].decoder.final_layernorm.weight
    (gradient,) = torch.autograd.grad(loss, weight)
    return float(loss), gradient


@pytest.mark.parametrize("name", CASES)
def test_loss_and_gradient_of_a_step_are_those_of_the_definition(ranks, outcomes, name):
    ((loss, gradient),) = ranks.run(loss_and_gradient_by_definition, CASES[name], world_size=1)
    got, gradients, _ = outcomes(CASES[name])
    assert got.loss == pytest.approx(loss, rel=1e-4)
    torch.testing.assert_close(gradients["decoder.final_layernorm.weight"], gradient, rtol=1e-3, atol=1e-7)


def measured_masses(case: Case) -> tuple[torch.Tensor, torch.Tensor]:
    """Return the target's mass on tokens that are rare for the student: measured, and by definition, token by token.

    Rare is what has less than a fiftieth, since random models of a tiny vocabulary have no tokens that are rarer.
    """
    model = models.model_config(case.kind)
    chunks, grid = models.build(model, case.parallel)
    teacher = build_chunks(model, chunks[0].config, grid, models.VOCAB_SIZE)
    models.fill_from_names(teacher, seed=1)
    student = wrap_for_training(chunks, case.optimizer)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(target_measures, "RARE", 0.02)
        output = schedule.run(
            student,
            schedule.ScheduledTeacher(teacher),
            packed(case, grid),
            token_losses.self_distillation(case.target, Divergence(), fusion=case.fusion),
            grid,
            vocab_shard(student, grid),
            reference=reference(case, teacher),
            guided=case.guided,
            measurement=TokenMeasurement(case.target, chunk_tokens=5),
            forward_only=True,
        )
    masses = torch.full((len(output.response_ids),), torch.nan, dtype=torch.float64)
    masses[output.response_ids] = output.measures.mass_on_rare_student
    expected = []
    for context in contexts_of(case):
        s, t, r = rows_of(context, unwrapped(student[0]), teacher[0], teacher[0])
        weight = case.guided.teacher_weight if context.guided else case.target.teacher_weight
        log_q = mixed_target(s, t, dataclasses.replace(case.target, teacher_weight=weight), r).log_q
        expected.append(torch.where(s.softmax(-1) < 0.02, log_q.exp(), 0.0).sum(-1).detach())
    return masses, torch.cat(expected)


def test_the_mass_on_rare_tokens_is_measured_with_each_tokens_own_weight(ranks):
    ((measured, expected),) = ranks.run(measured_masses, CASES["weight"], world_size=1)
    assert expected.mean() > 1e-2, "a test of nothing"
    torch.testing.assert_close(measured, expected, rtol=1e-3, atol=1e-5)


def test_packing_marks_the_tokens_of_guided_responses():
    pairs = contexts_of(BOTH)
    batch = pack(pairs, PackingRules(max_tokens=56, cp_size=1, tp_size=1, paired=False))
    assert batch.guided.tolist() == [pair.guided for pair in pairs for _ in pair.response]
    assert 0 < batch.guided.sum() < len(batch.guided)
