# Copyright (c) 2026 the megatron_selfdistill authors. Apache-2.0.
"""The subclass of TRL's SDFTTrainer makes the gradient of this project's pipeline on the responses that TRL samples."""

from __future__ import annotations

import datasets
import pytest
import torch
from trainer_gradients import HINTED, PROMPTS, RESPONSES, word_tokenizer
from trainers.trl_trainer import SelfDistillationTrainer, main
from trl.experimental.sdft import SDFTConfig

from megatron_selfdistill.loss import Target


@pytest.fixture
def tokenizer():
    return word_tokenizer()


def text(ids):
    return " ".join(f"<{i}>" for i in ids)


@pytest.fixture
def trainer_of(tiny_qwen3, tokenizer, tmp_path, monkeypatch):
    def make(**options):
        kind = options.pop("teacher_model_kind", "base")
        hints = [text(hinted[len(prompt) :]) for prompt, hinted in zip(PROMPTS, HINTED, strict=True)]
        rows = [
            {"prompt": text(prompt), "privileged_context": hint} for prompt, hint in zip(PROMPTS, hints, strict=True)
        ]
        config = SDFTConfig(
            str(tmp_path),
            use_cpu=True,
            report_to="none",
            bf16=False,
            teacher_model_kind=kind,
            teacher_prompt_template="{prompt} {privileged_context}",
            num_generations=1,
            per_device_train_batch_size=3,
            max_completion_length=6,
            gradient_checkpointing=False,
            model_init_kwargs={"dtype": "float32"},
        )
        data = datasets.Dataset.from_list(rows)
        trainer = SelfDistillationTrainer(
            str(tiny_qwen3), config, train_dataset=data, processing_class=tokenizer, **options
        )
        monkeypatch.setattr(trainer, "_generate", lambda ids: (ids, RESPONSES))
        trainer.current_gradient_accumulation_steps = 1  # as in a training loop
        return trainer, rows

    return make


def test_the_gradient_is_that_of_the_pipeline(trainer_of, expected):
    trainer, rows = trainer_of()
    trainer.model.train()
    batch = trainer._prepare_training_batch(rows)
    trainer.compute_loss(trainer.model, batch).backward()
    gradients = {name: parameter.grad for name, parameter in trainer.model.named_parameters()}
    assert gradients.keys() == expected.keys()
    largest = max(float(gradient.abs().max()) for gradient in expected.values())
    for name, gradient in gradients.items():
        torch.testing.assert_close(gradient, expected[name], rtol=1e-5, atol=1e-5 * largest, msg=name)


def test_the_target_of_the_subclass_is_used_and_logged(trainer_of):
    losses = []
    for target in (Target(), Target("teacher_alone", anchor="student"), Target(anchor=0.2)):
        trainer, rows = trainer_of(target=target)
        trainer.model.train()
        loss = trainer.compute_loss(trainer.model, trainer._prepare_training_batch(rows)).item()
        assert trainer._metrics["train"]["self_distillation/distillation_loss"] == [pytest.approx(loss)]
        losses.append(loss)
    assert losses[1] > 1.2 * losses[0]


def test_a_teacher_that_moves_is_refused(trainer_of):
    with pytest.raises(ValueError, match="expected teacher_model_kind='base', got 'live'"):
        trainer_of(teacher_model_kind="live")


def test_a_response_without_a_token_to_train_on_costs_nothing(trainer_of):
    trainer, rows = trainer_of()
    batch = trainer._prepare_training_batch(rows)
    batch["completion_mask"] = torch.zeros_like(batch["completion_mask"])
    assert trainer.compute_loss(trainer.model, batch).item() == 0


def test_the_file_of_the_page_trains_and_evaluates_as_it_stands(tiny_chat_qwen3, tmp_path):
    options = {"use_cpu": True, "bf16": False, "report_to": "none", "eval_strategy": "steps", "eval_steps": 1}
    trainer = main(str(tiny_chat_qwen3), str(tmp_path), max_completion_length=4, max_steps=2, **options)
    assert [log["step"] for log in trainer.state.log_history if log.get("eval_loss", 0) > 0] == [1, 2]
    assert [log["step"] for log in trainer.state.log_history if log.get("loss", 0) > 0] == [1, 2]
