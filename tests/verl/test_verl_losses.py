# Copyright (c) 2026 the megatron_selfdistill authors. Apache-2.0.
"""verl's own loss function, with the mode of examples/trainers, makes the gradient of this project's pipeline."""

from __future__ import annotations

import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
import trainer_gradients
from tensordict import TensorDict
from torch import Tensor
from trainer_gradients import HINTED, PROMPTS, RESPONSES

sys.path.insert(0, str(Path(__file__).resolve().parents[2] / "examples"))

from trainers import verl_losses
from verl.trainer.distillation.losses import distillation_ppo_loss
from verl.utils.tensordict_utils import get_tensordict
from verl.workers.config import DistillationLossConfig


def nested(rows: list[Tensor]) -> Tensor:
    return torch.nested.as_nested_tensor(rows, layout=torch.jagged)


def batch_of(model: torch.nn.Module, topk: int) -> tuple[TensorDict, list[Tensor]]:
    """Return a micro batch as verl makes it, and the tokens of its sequences; the teacher reads the hints."""
    texts = [torch.tensor([*prompt, *response]) for prompt, response in zip(PROMPTS, RESPONSES, strict=True)]
    best = []
    for prompt, hinted, response in zip(PROMPTS, HINTED, RESPONSES, strict=True):
        with torch.no_grad():
            logits = model(torch.tensor([[*hinted, *response]])).logits[0]
        rows = logits[len(hinted) - 1 :].log_softmax(-1)  # those that predict the response, and the last one
        rows = torch.cat([rows[:1].expand(len(prompt) - 1, -1), rows])  # verl's loss reads no row before them
        best.append(rows.topk(topk))
    data = {
        "input_ids": nested(texts),
        "prompts": nested([torch.tensor(prompt) for prompt in PROMPTS]),
        "responses": nested([torch.tensor(response) for response in RESPONSES]),
        "response_mask": nested([torch.ones(len(response)) for response in RESPONSES]),
        "teacher_logprobs": nested([found.values for found in best]),
        "teacher_ids": nested([found.indices for found in best]),
    }
    counts = {"dp_size": 1, "batch_num_tokens": sum(map(len, RESPONSES)), "global_batch_size": len(RESPONSES)}
    return get_tensordict(data, counts), texts


def loss_of(model: torch.nn.Module, topk: int) -> Tensor:
    """Return the loss of a step by verl's function, in its two calls: on packed logits, and on what they gave."""
    data, texts = batch_of(model, topk)
    mode = DistillationLossConfig(loss_mode=verl_losses.NAME, use_task_rewards=False, use_policy_gradient=False)
    actor = SimpleNamespace(strategy="fsdp2", loss_agg_mode="token-mean", global_batch_info={}, loss_scale_factor=None)
    configs = actor, SimpleNamespace(distillation_loss=mode)
    logits = torch.cat([model(text[None]).logits[0] for text in texts])[None]
    found = distillation_ppo_loss(*configs, data=data, student_logits=logits)
    offsets = data["input_ids"].offsets()
    rows = {name: torch.nested.nested_tensor_from_jagged(value[0], offsets) for name, value in found.items()}
    loss, metrics = distillation_ppo_loss(*configs, model_output=rows, data=data)
    assert 0 <= metrics["distillation/teacher_mass"] <= 1 + 1e-5
    return loss


def test_verl_makes_the_gradient_of_the_pipeline_and_a_tail_comes_close(ranks, tmp_path_factory):
    from transformers import AutoModelForCausalLM

    directory = trainer_gradients.write_model(tmp_path_factory.mktemp("qwen3"))
    (expected,) = ranks.run(trainer_gradients.by_the_pipeline, directory, world_size=1)
    model = AutoModelForCausalLM.from_pretrained(directory, dtype=torch.float32)
    exact = loss_of(model, model.config.vocab_size)
    exact.backward()
    largest = max(float(gradient.abs().max()) for gradient in expected.values())
    for name, parameter in model.named_parameters():
        torch.testing.assert_close(parameter.grad, expected[name], rtol=1e-5, atol=1e-5 * largest, msg=name)
    assert loss_of(model, model.config.vocab_size - 1).item() == pytest.approx(exact.item(), rel=0.05)
