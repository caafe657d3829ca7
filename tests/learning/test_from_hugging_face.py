# Copyright (c) 2026 the megatron_selfdistill authors. Apache-2.0.
"""The example that begins and ends with a Hugging Face folder: what leaves is what was trained."""

from __future__ import annotations

import json
from types import ModuleType

import pytest
import torch


@pytest.fixture(scope="module")
def example(load_example) -> ModuleType:
    module = load_example("06_from_hugging_face")
    module.PRETRAINING_STEPS = 40
    return module


@pytest.fixture(scope="module")
def task(example, root):
    return example.subtraction_task(5, root)


def test_a_hugging_face_folder_becomes_a_self_distilled_one(example, task, root, capsys):
    assert example.main(["--directory", str(root), "--steps", "3"]) == 0
    shown = capsys.readouterr().out
    assert "after" in shown and "selfdistill convert megatron-to-hf" in shown
    out = root / "from_hugging_face" / "seed5" / "self_distilled"
    (tokenizer, before), (_, after) = example.load(task.hf), example.load(out)
    assert json.loads((out / "config.json").read_text())["architectures"] == ["Qwen3ForCausalLM"]
    assert tokenizer("500-408:")["input_ids"] == [5, 0, 0, 10, 4, 0, 8, 16]
    assert before.state_dict().keys() == after.state_dict().keys()
    moved = [not torch.equal(tensor, after.state_dict()[name]) for name, tensor in before.state_dict().items()]
    assert all(moved)


def test_the_logits_of_the_folder_are_those_of_the_live_model_and_not_those_of_the_start(example, task, root):
    out, difference = example.distil(task, root / "compared", num_steps=3, seed=5)
    assert difference <= 1e-4
    overrides = (*task.overrides, "num_steps=3", "seed=5", f"data.tokenizer={task.hf}")
    places = (f"checkpoint.load={root / 'compared' / 'megatron'}", f"run_dir={root / 'again'}")
    texts, live = example.train((*overrides, *places), task.config_name)
    assert example.largest_difference(out, texts, live) <= 1e-4
    assert example.largest_difference(task.hf, texts, live) > 1e-2


def test_a_folder_and_problems_of_ones_own(example, task, root):
    problems = root / "from_hugging_face" / "train.jsonl"
    settings = ["data.teacher_template='{problem}H{solution}|'", "rollout.max_new_tokens=26", "data.limit=16"]
    arguments = ["--hf", str(task.hf), "--data", str(problems), "--directory", str(root), "--steps", "2", *settings]
    assert example.main(arguments) == 0
    assert (root / "from_hugging_face" / task.hf.name / "self_distilled" / "model.safetensors").exists()


@pytest.mark.parametrize("arguments", [["--hf", "somewhere"], ["--data", "problems.jsonl"], ["num_steps=3"]])
def test_options_that_need_each_other(example, arguments, capsys):
    with pytest.raises(SystemExit) as stopped:
        example.main(arguments)
    assert stopped.value.code == 2
    assert "--hf, --data and settings go together" in capsys.readouterr().err
