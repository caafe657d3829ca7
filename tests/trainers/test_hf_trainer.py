# Copyright (c) 2026 the megatron_selfdistill authors. Apache-2.0.
"""The Trainer of transformers makes the gradient of this project's pipeline, with all weights and with adapters."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

import pytest
import torch
from trainer_gradients import END, HINTED, PROMPTS, RESPONSES, assert_gradients

from megatron_selfdistill.loss import Target

if TYPE_CHECKING:  # the imports take a second in each process that collects tests
    from trainers.hf_trainer import SelfDistillationTrainer

ROWS = [{"prompt": prompt, "hinted": hinted} for prompt, hinted in zip(PROMPTS, HINTED, strict=True)]


def trainer_of(model: torch.nn.Module, directory: Path, **options) -> SelfDistillationTrainer:
    """Return a trainer whose responses are `RESPONSES`, unless the test deletes ``responses``."""
    from trainers.hf_trainer import SelfDistillationTrainer
    from transformers import TrainingArguments

    own = {"remove_unused_columns": False, "use_cpu": True, "report_to": "none", "max_steps": 1, "logging_steps": 1}
    arguments = TrainingArguments(str(directory), **own)
    trainer = SelfDistillationTrainer(model, arguments, train_dataset=ROWS, max_new_tokens=6, **options)
    trainer.responses = lambda *_: RESPONSES
    return trainer


@pytest.fixture
def model(tiny_qwen3):
    from transformers import AutoModelForCausalLM

    return AutoModelForCausalLM.from_pretrained(tiny_qwen3, dtype=torch.float32)


@pytest.mark.full
def test_all_weights_have_the_gradient_of_the_pipeline(model, expected, tmp_path):
    trainer_of(model, tmp_path).compute_loss(model, ROWS).backward()
    assert_gradients({name: parameter.grad for name, parameter in model.named_parameters()}, expected)


def test_adapters_have_the_gradient_that_follows_from_it_and_no_second_copy_is_made(model, expected, tmp_path):
    from peft import LoraConfig, get_peft_model

    adapted = get_peft_model(model, LoraConfig(r=3, lora_alpha=6, target_modules=["q_proj", "down_proj"]))
    trainer = trainer_of(adapted, tmp_path)
    assert trainer.frozen is None
    trainer.compute_loss(adapted, ROWS).backward()
    largest = max(float(gradient.abs().max()) for gradient in expected.values())
    found = [(name, module) for name, module in model.named_modules() if hasattr(module, "lora_B")]
    assert len(found) == 8
    for name, module in found:
        a, b = module.lora_A["default"].weight.detach(), module.lora_B["default"].weight
        wanted = 2.0 * expected[f"{name}.weight"] @ a.t()  # W + 2 B A, and B starts at zero
        torch.testing.assert_close(b.grad, wanted, rtol=1e-5, atol=1e-5 * largest * float(a.abs().sum(1).max()))


def test_what_the_controls_of_a_row_say_too_is_not_learnt(model, tmp_path):
    trainer = trainer_of(model, tmp_path, target=Target(anchor=0.1, num_controls=2))
    rows = {name: [row | {"controls": [row["hinted"], row[name]]} for row in ROWS] for name in ("hinted", "prompt")}
    assert trainer.compute_loss(model, rows["hinted"]) < 1e-6 < 1e-3 < trainer.compute_loss(model, rows["prompt"])


def test_a_response_ends_with_its_first_end_and_has_all_its_tokens_where_the_model_has_none(
    model, tmp_path, monkeypatch
):
    trainer = trainer_of(model, tmp_path)
    del trainer.responses
    drawn = torch.tensor([[8, END, 9, END], [END, 0, 0, 0], [4, 5, 6, 7]])
    with monkeypatch.context() as patch:
        patch.setattr(model, "generate", lambda ids, **options: torch.cat([ids, drawn], dim=1))
        assert trainer.responses(model, PROMPTS) == [[8, END], [END], [4, 5, 6, 7]]
    model.generation_config.eos_token_id = None
    assert [len(response) for response in trainer.responses(model, PROMPTS)] == [6, 6, 6]


@pytest.mark.full
def test_the_file_of_the_page_trains_and_evaluates_as_it_stands(tiny_chat_qwen3, tmp_path):
    from trainers.hf_trainer import main

    options = {"use_cpu": True, "report_to": "none", "eval_strategy": "steps", "eval_steps": 1, "disable_tqdm": True}
    history = main(str(tiny_chat_qwen3), str(tmp_path), max_new_tokens=4, max_steps=2, **options).state.log_history
    for key in ("eval_loss", "loss"):
        assert [log["step"] for log in history if log.get(key, 0) > 0] == [1, 2]
    assert {"model.safetensors", "tokenizer.json", "trainer_state.json"} <= {file.name for file in tmp_path.iterdir()}
