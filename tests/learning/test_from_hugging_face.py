# Copyright (c) 2026 the megatron_selfdistill authors. Apache-2.0.
"""The example that begins and ends with a Hugging Face directory: what leaves is what was trained."""

from __future__ import annotations

import json

import pytest
import torch


@pytest.mark.full
def test_a_hugging_face_directory_becomes_one_with_the_logits_of_the_model(load_example, root, monkeypatch, capsys):
    example, trained = load_example("06_from_hugging_face"), []
    monkeypatch.setattr(example, "PRETRAINING_STEPS", 10)
    monkeypatch.setattr(example, "NUM_SHOWN", 20)
    task, train = example.subtraction_task(5, root), example.train
    monkeypatch.setattr(example, "train", lambda *arguments: trained.append(train(*arguments)) or trained[-1])
    assert example.main(["--directory", str(root), "--steps", "2"]) == 0
    shown = capsys.readouterr().out
    assert "after" in shown and "selfdistill convert megatron-to-hf" in shown
    directory = root / "from_hugging_face" / "seed5" / "self_distilled"
    (tokenizer, before), (_, after) = example.load(task.hf), example.load(directory)
    assert json.loads((directory / "config.json").read_text())["architectures"] == ["Qwen3ForCausalLM"]
    assert tokenizer("500-408:")["input_ids"] == [5, 0, 0, 10, 4, 0, 8, 16]
    assert before.state_dict().keys() == after.state_dict().keys()
    assert not any(torch.equal(tensor, after.state_dict()[name]) for name, tensor in before.state_dict().items())
    [(texts, live)] = trained
    assert example.largest_difference(directory, texts, live) <= 1e-4
    assert example.largest_difference(task.hf, texts, live) > 1e-2, "the start has other logits"
