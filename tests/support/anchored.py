# Copyright (c) 2026 the megatron_selfdistill authors. Apache-2.0.
"""A step whose target is anchored to a reference, and the loss of such steps by its definition."""

from __future__ import annotations

from typing import Any

import models
import torch
from layouts import Case, GivenCoefficients, contexts_of, soft_capped
from logit_pairs import divergence

from megatron_selfdistill.config import ParallelConfig
from megatron_selfdistill.data.contexts import ContextPair
from megatron_selfdistill.loss.definition import mixed_target
from megatron_selfdistill.loss.target import Divergence, Target

ANCHORED = Case(kind="shallow", target=Target(anchor="reference", teacher_weight=0.5))


def chunks_of(case: Case) -> list[Any]:
    """Return whole models on one rank: student, teacher and reference of the case."""
    model = models.model_config(case.kind)
    (student,), grid = models.build(model, ParallelConfig())
    [teacher] = [student] if case.teacher == "current" else models.another(model, [student], grid)
    [reference] = models.another(model, [student], grid, case.reference_seed) if case.reference_copy else [teacher]
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
    """Return the mean divergence in float64, and the gradient of the loss to the weights of the final norm."""
    student, teacher, reference = chunks_of(case)
    losses, log_probs, target = [], [], case.target
    for context in contexts_of(case):
        s, t, r, *controls = rows_of(context, student, teacher, reference)
        anchor = r.detach() if target.has_reference else None
        control_logits = torch.stack(controls).detach() if controls else None
        log_q = mixed_target(s.detach(), t.detach(), target, anchor, control_logits).log_q
        losses.append(divergence(s.log_softmax(-1), log_q, Divergence(case.divergence)))
        log_probs.append(s.log_softmax(-1).gather(1, torch.tensor(context.response)[:, None])[:, 0])
    loss = objective = torch.cat(losses)
    if case.two_terms:
        given = GivenCoefficients.of(contexts_of(case))(torch.cat(log_probs).detach(), torch.arange(len(loss)))
        objective = given.token_losses(loss, torch.cat(log_probs))
    (gradient,) = torch.autograd.grad(objective.mean(), student.decoder.final_layernorm.weight)
    return float(loss.mean()), gradient
