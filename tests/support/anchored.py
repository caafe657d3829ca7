# Copyright (c) 2026 the megatron_selfdistill authors. Apache-2.0.
"""Steps whose target is anchored to a reference, the layouts that they run in, and their loss by its definition."""

from __future__ import annotations

import dataclasses
from typing import Any

import models
import pytest
import torch
from layouts import Case, Outcomes, contexts_of, soft_capped, worst_difference
from logit_pairs import divergence
from models import parallel
from parity import TOLERANCE
from ranks import RankPool

from megatron_selfdistill.config import ParallelConfig
from megatron_selfdistill.data.contexts import ContextPair
from megatron_selfdistill.loss.definition import mixed_target
from megatron_selfdistill.loss.target import Divergence, Target
from megatron_selfdistill.model.build import build_chunks
from megatron_selfdistill.model.forward import Fusion

ANCHORED = Case(kind="shallow", target=Target(anchor="reference", teacher_weight=0.5))
APART = {
    "average teacher": dataclasses.replace(ANCHORED, teacher="ema", reference_copy=True),
    "current teacher": dataclasses.replace(ANCHORED, teacher="current", reference_copy=True),
    "soft cap": dataclasses.replace(ANCHORED, soft_cap=3.0),
}
"""The cases in which one projection cannot serve teacher and reference."""
LAYOUTS: dict[str, tuple[str, ParallelConfig, int]] = {
    "TP2+SP": ("shallow", parallel(tp=2, sp=True), 2),
    "PP2 tied": ("tied", parallel(pp=2), 2),
    "PP2xVPP2": ("gqa", parallel(pp=2, vpp=2), 2),
    "CP2": ("shallow", parallel(cp=2), 2),
    "DP2": ("shallow", parallel(), 2),
    "EP2": ("moe", parallel(ep=2), 2),
    "CP2xPP2": ("shallow", parallel(cp=2, pp=2), 4),
    "EP2xTP2+SP": ("moe", parallel(ep=2, tp=2, etp=1, sp=True), 2),
}
ORDERS = {"teacher first": {}, "alternating": {"pair_order": "alternating", "paired": True}}
OUTPUT_LAYERS = {"materialised": None, "fused": Fusion("keep_gradient", 4), "low memory": Fusion("low_memory", 4)}


def assert_equals_one_rank(
    outcomes: Outcomes,
    name: str,
    own: Case,
    order: dict[str, Any],
    output_layer: Fusion | None,
    *,
    nan_ok: bool = False,
) -> None:
    """Assert that a step in the layout ``name`` has the gradients and the numbers of one rank.

    ``nan_ok``: whether the teacher's entropy may be unknown in both.
    """
    kind, cuts, world_size = LAYOUTS[name]
    alone, expected, _ = outcomes(dataclasses.replace(own, kind=kind))
    assert alone.loss > 0.02, "the target must differ from the student"
    case = dataclasses.replace(own, kind=kind, parallel=cuts, fusion=output_layer, **order)
    got, gradients, _ = outcomes(case, world_size)
    worst, where = worst_difference(gradients, expected)
    assert worst <= TOLERANCE, f"gradient of {where} differs by {worst:.1e}"
    assert got.loss == pytest.approx(alone.loss, rel=TOLERANCE)
    assert got.teacher_entropy == pytest.approx(alone.teacher_entropy, rel=TOLERANCE, nan_ok=nan_ok)


def assert_equals_definition(ranks: RankPool, outcomes: Outcomes, case: Case) -> None:
    """Assert that a step of one rank has the loss and the gradient of the definition."""
    ((loss, gradient),) = ranks.run(loss_and_gradient_by_definition, case, world_size=1)
    got, gradients, _ = outcomes(case)
    assert got.loss == pytest.approx(loss, rel=1e-4)
    torch.testing.assert_close(gradients["decoder.final_layernorm.weight"], gradient, rtol=1e-3, atol=1e-7)


def is_possible(own: Case, output_layer: Fusion | None) -> bool:
    """Return whether the output layer can compute a case: only a linear one is fused, a kept gradient has one term."""
    return not (own.soft_cap and output_layer) and not (own.two_terms and output_layer == OUTPUT_LAYERS["fused"])


def chunks_of(case: Case) -> list[Any]:
    """Return whole models on one rank: student, teacher and reference of the case."""
    model = models.model_config(case.kind)
    (student,), grid = models.build(model, ParallelConfig())

    def filled(seed: int) -> torch.nn.Module:
        chunks = build_chunks(model, student.config, grid, models.VOCAB_SIZE)
        models.fill_from_names(chunks, seed=seed)
        return chunks[0]

    teacher = student if case.teacher == "current" else filled(1)
    reference = filled(case.reference_seed) if case.reference_copy else teacher
    return soft_capped([student, teacher, reference], case.soft_cap)


def rows_of(
    context: ContextPair, student: Any, teacher: Any, reference: Any, vocab_size: int = models.VOCAB_SIZE
) -> list[torch.Tensor]:
    """Return whole rows of logits [R, V] in float64 of the three models for one response, and those of the controls."""
    rows = []
    for chunk, prompt in (
        (student, context.student_prompt),
        (teacher, context.teacher_prompt),
        (reference, context.student_prompt),
        *((teacher, prompt) for prompt in context.control_prompts),
    ):
        tokens = torch.tensor([prompt + context.response])
        logits = chunk(tokens, torch.arange(tokens.size(1))[None], None)[0, :, :vocab_size]
        rows.append(logits[len(prompt) - 1 : -1].double())
    return rows


def loss_and_gradient_by_definition(case: Case) -> tuple[float, torch.Tensor]:
    """Return the mean divergence from whole rows of logits in float64, one context after the other.

    The second result is its gradient to the weights of the final norm, which all tokens share.
    """
    student, teacher, reference = chunks_of(case)
    losses, target = [], case.target
    for context in contexts_of(case):
        s, t, r, *controls = rows_of(context, student, teacher, reference)
        anchor = r.detach() if target.has_reference else None
        control_logits = torch.stack(controls).detach() if controls else None
        log_q = mixed_target(s.detach(), t.detach(), target, anchor, control_logits).log_q
        losses.append(divergence(s.log_softmax(-1), log_q, Divergence(case.divergence)))
    loss = torch.cat(losses).mean()
    (gradient,) = torch.autograd.grad(loss, student.decoder.final_layernorm.weight)
    return float(loss), gradient
