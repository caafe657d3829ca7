# Copyright (c) 2026 the megatron_selfdistill authors. Apache-2.0.
"""Runs in which student and teacher read the response after different generation prompts and system prompts."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from tiny_run import overrides, recorded, reproducible_metrics, train, with_trainer

TEMPLATE = (
    "{% for m in messages %}{{ m.content }}{% endfor %}"
    "{% if add_generation_prompt %}{% if enable_thinking %}=.;{% else %}|{% endif %}{% endif %}"
)
VIEWS = [
    f"data.chat_template='{TEMPLATE}'",
    "data.views.student={chat_template_kwargs: {enable_thinking: false}}",
    "data.views.teacher={chat_template_kwargs: {enable_thinking: true}, system_prompt: '9,9'}",
]
STUDENT, TEACHER = "{problem}|", "9,9{problem}H{solution}|=.;"
"""The texts of both prompts by the template and the views."""
NUM_STEPS = 2


def arguments(data: Path, run_dir: Path, *more: str) -> list[str]:
    """Return the arguments of two steps of the default method with two views."""
    return overrides(data, run_dir, *VIEWS, f"num_steps={NUM_STEPS}", "checkpoint.save_every=0", *more)


def by_definition(arguments: list[str], data: Path, responses: dict[tuple[str, int], list[int]]) -> tuple[float, float]:
    """Return the first step's mean reverse KL and the norm of its gradient, from whole rows of logits in float64.

    The prompts are written out in this file, and the target is the teacher alone.
    """
    records = [json.loads(line) for line in (data / "problems.jsonl").read_text(encoding="utf-8").splitlines()]
    by_id = {f"{record['id']}": record for record in records}

    def measured(trainer: Any) -> tuple[float, float]:
        (chunk,), tokenizer = trainer.learner.chunks, trainer.run_data.tokenizer
        chunk.train()

        def log_probs(prompt: list[int], response: list[int]) -> torch.Tensor:
            tokens = torch.tensor([prompt + response])
            logits = chunk(tokens, torch.arange(tokens.size(1))[None], None)[0, :, : tokenizer.vocab_size]
            return logits[len(prompt) - 1 : -1].double().log_softmax(-1)

        losses = []
        for (name, _), response in responses.items():
            student, teacher = (tokenizer.encode(text.format_map(by_id[name])) for text in (STUDENT, TEACHER))
            log_p = log_probs(student, response)
            log_q = log_probs(teacher, response).detach()
            losses.append((log_p.exp() * (log_p - log_q)).sum(-1))
        loss = torch.cat(losses).mean()
        parameters = [parameter for parameter in chunk.parameters() if parameter.requires_grad]
        gradients = torch.autograd.grad(loss, parameters, allow_unused=True)
        return float(loss), float(torch.cat([g.flatten() for g in gradients if g is not None]).norm())

    return with_trainer(arguments, measured)


def test_losses_and_gradients_are_those_of_the_prompts_written_out(ranks, data, start, tmp_path):
    run = tmp_path / "run"
    options = [start, "target=teacher_alone", "optimizer.clip_grad=0"]
    train(ranks, arguments(data, run, *options, f"tests.record={run}/responses.jsonl"))
    responses = recorded(run / "responses.jsonl", step=0)
    again = arguments(data, tmp_path / "again", *options)
    ((loss, norm),) = ranks.run(by_definition, again, data, responses, world_size=1, init_process_group=False)
    first = reproducible_metrics(run)[0]
    assert first["loss/mean"] == pytest.approx(loss, rel=1e-4) and loss > 1e-3
    assert first["gradient_norm"] == pytest.approx(norm, rel=1e-3)
