# Copyright (c) 2026 the megatron_selfdistill authors. Apache-2.0.
"""The subclass of TRL's SDFTTrainer makes the gradient of this project's pipeline on the responses that TRL samples."""

from __future__ import annotations

import datasets
import pytest
import torch
from trainer_gradients import HINTED, PROMPTS, RESPONSES, assert_gradients, word_tokenizer
from trainers.trl_trainer import SelfDistillationTrainer, main
from trl.experimental.sdft import SDFTConfig

from megatron_selfdistill.loss import Target

TEXTS, HINTS = (
    [" ".join(f"<{i}>" for i in ids) for ids in some]
    for some in (PROMPTS, [hinted[len(prompt) :] for prompt, hinted in zip(PROMPTS, HINTED, strict=True)])
)
ROWS = [{"prompt": text, "privileged_context": hint} for text, hint in zip(TEXTS, HINTS, strict=True)]
CONFIG = {
    **{"use_cpu": True, "report_to": "none", "bf16": False, "gradient_checkpointing": False, "num_generations": 1},
    **{"teacher_prompt_template": "{prompt} {privileged_context}", "per_device_train_batch_size": 3},
    **{"max_completion_length": 6, "model_init_kwargs": {"dtype": "float32"}},
}


@pytest.fixture
def trainer_of(tiny_qwen3, tmp_path, monkeypatch):
    def make(teacher_model_kind="base", **options):
        config = SDFTConfig(str(tmp_path), teacher_model_kind=teacher_model_kind, **CONFIG)
        options |= {"train_dataset": datasets.Dataset.from_list(ROWS), "processing_class": word_tokenizer()}
        trainer = SelfDistillationTrainer(str(tiny_qwen3), config, **options)
        monkeypatch.setattr(trainer, "_generate", lambda ids: (ids, RESPONSES))
        trainer.current_gradient_accumulation_steps = 1  # as in a training loop
        trainer.model.train()
        return trainer

    return make


def test_the_gradient_is_that_of_the_pipeline(trainer_of, expected):
    trainer = trainer_of()
    trainer.compute_loss(trainer.model, trainer._prepare_training_batch(ROWS)).backward()
    assert_gradients({name: parameter.grad for name, parameter in trainer.model.named_parameters()}, expected)


def test_the_target_of_the_subclass_is_used_and_logged(trainer_of):
    losses = []
    for target in (Target(), Target("teacher_alone", anchor="student"), Target(anchor=0.2)):
        trainer = trainer_of(target=target)
        loss = trainer.compute_loss(trainer.model, trainer._prepare_training_batch(ROWS)).item()
        assert trainer._metrics["train"]["self_distillation/distillation_loss"] == [pytest.approx(loss)]
        losses.append(loss)
    assert losses[1] > 1.2 * losses[0]


def test_a_teacher_that_moves_is_refused_and_a_response_without_a_token_to_train_on_costs_nothing(trainer_of):
    with pytest.raises(ValueError, match="teacher_model_kind"):
        trainer_of("live")
    trainer = trainer_of()
    batch = trainer._prepare_training_batch(ROWS)
    batch["completion_mask"] = torch.zeros_like(batch["completion_mask"])
    assert trainer.compute_loss(trainer.model, batch).item() == 0


def test_the_file_of_the_page_trains_and_evaluates_as_it_stands(tiny_chat_qwen3, tmp_path):
    options = {"use_cpu": True, "bf16": False, "report_to": "none", "eval_strategy": "steps", "eval_steps": 1}
    trainer = main(str(tiny_chat_qwen3), str(tmp_path), max_completion_length=4, max_steps=2, **options)
    history = trainer.state.log_history
    for key in ("eval_loss", "loss"):
        assert [log["step"] for log in history if log.get(key, 0) > 0] == [1, 2]
