# Copyright (c) 2026 the megatron_selfdistill authors. Apache-2.0.
"""Runs with several teachers: their data, their directories, and the gradient of a step by its definition."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from anchored import rows_of
from logit_pairs import kl
from torch import Tensor

from megatron_selfdistill.data.contexts import ContextPair, TeacherPrompt
from megatron_selfdistill.loss.definition import mixed_target
from megatron_selfdistill.loss.target import Target


def write_records_of_teachers(
    data: Path, names: Sequence[str | dict[str, float] | None], file: str = "taught.jsonl"
) -> Path:
    """Write the problems of ``data`` again, each with the next of the ``names`` of teachers; None names none."""
    records = [json.loads(line) for line in (data / "problems.jsonl").read_text().splitlines()]
    for index, record in enumerate(records):
        if (name := names[index % len(names)]) is not None:
            record["teacher"] = name
    (data / file).write_text("".join(f"{json.dumps(record)}\n" for record in records))
    return data / file


def trained_gradients(trainer: Any) -> tuple[list[ContextPair], dict[str, Tensor]]:
    step: list[Any] = []
    for batch in trainer.batches():
        balanced = trainer.balance(batch)
        step.append(trainer.forward_backward(balanced, trainer.pack(balanced), step))
    (chunk,) = trainer.learner.chunks
    found = {name: p.main_grad.clone() for name, p in chunk.module.named_parameters()}
    return [context for one in step for context in one.batch.contexts], found


def gradients_by_definition(
    contexts: Sequence[ContextPair], student, reference, teachers, target: Target, vocab_size: int, weights, shares
) -> dict[str, Tensor]:
    """Return the gradient of the mean reverse KL over all response tokens, from whole rows of float64 logits.

    ``contexts``: one per response and teacher, or one per response with all teachers of a product.  ``weights``: the w
    of each teacher that has one of its own.  ``shares``: problem -> the shares of several teachers of its contexts.
    """
    total = sum(len(context.response) for context in {it.problem_id: it for it in contexts}.values())
    loss = torch.zeros((), dtype=torch.float64)
    for context in contexts:
        several = context.of_teachers or (TeacherPrompt(context.teacher, 1.0, context.teacher_prompt),)
        own = {one.teacher: weights.get(one.teacher, target.teacher_weight) for one in several}
        mixed = sum(one.share * own[one.teacher] for one in several)
        log_t = torch.zeros((), dtype=torch.float64)
        for one in several:
            read = replace(context, teacher_prompt=one.prompt)
            s, t, r, *controls = rows_of(read, student, teachers[one.teacher], reference, vocab_size)
            log_t = log_t + one.share * own[one.teacher] / mixed * t.detach().log_softmax(-1)
        anchor = r.detach() if target.is_anchored else None
        control_logits = torch.stack(controls).detach() if controls else None
        own_target = target.with_teacher_weight(mixed)
        log_q = mixed_target(s.detach(), log_t, own_target, anchor, control_logits).log_q
        share = shares.get(context.problem_id, {}).get(context.teacher, 1.0)
        loss = loss + share * kl(s.log_softmax(-1), log_q).sum() / total
    names, parameters = zip(*student.named_parameters(), strict=True)
    return dict(zip(names, torch.autograd.grad(loss, parameters), strict=True))
