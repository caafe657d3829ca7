# Copyright (c) 2026 the megatron_selfdistill authors. Apache-2.0.
"""A step whose loss has a policy term has the gradient of plain autograd."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any

import layouts
import models
import pytest
import torch
from layouts import contexts, worst_difference
from parity import TOLERANCE
from two_terms import GivenCoefficients, token_losses

from megatron_selfdistill.config import OptimizerConfig, ParallelConfig
from megatron_selfdistill.data.packed_batch import PackingRules
from megatron_selfdistill.data.packing import pack
from megatron_selfdistill.loss import Divergence, Target, TokenStats
from megatron_selfdistill.model.build import build_chunks, wrap_for_training
from megatron_selfdistill.model.forward import Fusion, unwrapped
from megatron_selfdistill.pipeline import schedule
from megatron_selfdistill.pipeline import token_losses as losses
from megatron_selfdistill.pipeline.next_token import next_token

FUSIONS = {"logits": None, "low_memory": Fusion("low_memory", 5)}


def plain_gradient(
    student: torch.nn.Module, teacher: torch.nn.Module, coefficients: GivenCoefficients, *, distils: bool
) -> layouts.Joined:
    """Return the gradient by autograd of the mean over all tokens, one context at a time."""
    total, start = torch.zeros((), dtype=torch.float64), 0
    for context in contexts():
        rows, tokens = [], torch.tensor(context.response)
        for chunk, prompt in ((student, context.student_prompt), (teacher, context.teacher_prompt)):
            text = torch.tensor([prompt + context.response])
            logits = chunk(text, torch.arange(text.size(1))[None], None)[0, :, : models.VOCAB_SIZE]
            rows.append(logits[len(prompt) - 1 : -1].double())
        log_prob = rows[0].log_softmax(-1).gather(1, tokens[:, None])[:, 0]
        given = coefficients(log_prob.detach(), torch.arange(start, start + len(tokens)))
        assert given.policy is not None
        if distils:
            arguments = tokens, Target(anchor="student"), Divergence(), given.divergence, given.policy
            total = total + token_losses(rows[0], rows[1].detach(), rows[1].detach(), *arguments).sum()
        else:
            total = total - ((given.divergence + given.policy) * log_prob).sum()
        start += len(tokens)
    names, parameters = zip(*unwrapped(student).named_parameters(), strict=True)
    return dict(zip(names, torch.autograd.grad(total / start, parameters), strict=True))


def student_and_teacher() -> tuple[list[Any], list[Any], list[Any], Any]:
    """Return the chunks of the student with and without DDP, those of the teacher, and the rank grid."""
    model = models.model_config("tied", num_layers=2)
    chunks, grid = models.build(model, ParallelConfig())
    teacher = build_chunks(model, chunks[0].config, grid, models.VOCAB_SIZE)
    models.fill_from_names(teacher, seed=1)
    return chunks, teacher, grid


def gradients_of_steps() -> list[tuple[str, dict, dict]]:
    """Return (name, gradient by plain autograd, gradient of the schedule) of each token loss with two terms."""
    chunks, teacher, grid = student_and_teacher()
    coefficients = GivenCoefficients.of(contexts())
    plain = {distils: plain_gradient(chunks[0], teacher[0], coefficients, distils=distils) for distils in (True, False)}
    student = wrap_for_training(chunks, OptimizerConfig(precision="fp32", use_distributed_optimizer=False))
    token_loss_of: dict[str, Any] = {
        name: losses.self_distillation(Target(anchor="student"), Divergence(), fusion=fusion)
        for name, fusion in FUSIONS.items()
    }
    found = []
    for name, token_loss in {**token_loss_of, "next token": next_token}.items():
        distils = name != "next token"
        student[0].zero_grad_buffer()
        output = run(student, teacher if distils else None, token_loss, grid, coefficients)
        assert output.stats is not None and output.coefficients is not None
        expected = coefficients(output.stats.student_log_prob, output.response_ids)
        for field in dataclasses.fields(expected):
            assert torch.equal(getattr(output.coefficients, field.name), getattr(expected, field.name))
        assert 0.1 < output.coefficients.clipped.double().mean() < 0.9, "some tokens are clipped and some are not"
        gradients = {key: p.main_grad.clone() for key, p in unwrapped(student[0]).named_parameters()}
        found.append((name, plain[distils], gradients))
    return found


def run(student: list[Any], teacher: list[Any] | None, token_loss: Any, grid: Any, coefficients: Any, **options: Any):
    """Return the output of a step of the contexts."""
    batch = pack(contexts(), PackingRules(max_tokens=layouts.MAX_TOKENS, cp_size=1, tp_size=1, paired=False))
    vocab = layouts.vocab_shard(student, grid)
    return schedule.run(
        student,
        teacher and schedule.ScheduledTeacher(teacher),
        batch,
        token_loss,
        grid,
        vocab,
        token_coefficients=coefficients,
        **options,
    )


def test_a_step_of_two_terms_has_the_gradient_of_plain_autograd_with_and_without_a_teacher(ranks):
    for name, plain, ours in ranks.run(gradients_of_steps, world_size=1)[0]:
        worst, where = worst_difference(ours, plain)
        assert worst <= TOLERANCE, f"{name}, {where}: {worst:.1e}"


def refusals() -> list[str]:
    """Return the messages of steps with a policy term whose gradient the token loss does not have."""
    chunks, teacher, grid = student_and_teacher()
    student = wrap_for_training(chunks, OptimizerConfig(precision="fp32", use_distributed_optimizer=False))
    coefficients = GivenCoefficients.of(contexts())
    keeping = losses.self_distillation(Target(anchor="student"), Divergence(), fusion=Fusion("keep_gradient", 5))
    plain: Callable[..., TokenStats] = losses.self_distillation(Target(anchor="student"), Divergence())

    def detached(*arguments: Any, **options: Any) -> TokenStats:
        stats = plain(*arguments, **options)
        return dataclasses.replace(stats, student_log_prob=stats.student_log_prob.detach())

    messages = []
    for token_loss in (keeping, detached):
        with pytest.raises(ValueError) as caught:
            run(student, teacher, token_loss, grid, coefficients)
        messages.append(str(caught.value))
        run(student, teacher, token_loss, grid, coefficients, forward_only=True)
    return messages


def test_a_policy_term_without_a_gradient_is_refused_and_never_left_out(ranks):
    ((keeping, detached),) = ranks.run(refusals, world_size=1)
    assert "keep_gradient holds the gradient of the divergence alone" in keeping
    assert "token_coefficients has a policy term, whose gradient the token loss does not have" in detached
