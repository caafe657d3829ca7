# Copyright (c) 2026 the megatron_selfdistill authors. Apache-2.0.
"""The example that begins and ends with a Hugging Face directory: what leaves is what was trained."""

from __future__ import annotations

import contextlib
import io
import json
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType

import pytest
import torch

pytestmark = pytest.mark.full


@pytest.fixture(scope="module")
def example(load_example) -> ModuleType:
    module = load_example("06_from_hugging_face")
    module.PRETRAINING_STEPS = 10
    module.NUM_SHOWN = 20
    return module


@pytest.fixture(scope="module")
def task(example, root):
    return example.subtraction_task(5, root)


@dataclass
class Distilled:
    """A run of the example with 2 steps: its output, the new directory, and the logits of the live model."""

    shown: str
    directory: Path
    texts: list[list[int]]
    live: list[torch.Tensor]


@pytest.fixture(scope="module")
def distilled(example, task, root) -> Distilled:
    trained = []
    train = example.train
    with pytest.MonkeyPatch.context() as patch, contextlib.redirect_stdout(io.StringIO()) as shown:
        patch.setattr(example, "train", lambda *arguments: trained.append(train(*arguments)) or trained[-1])
        assert example.main(["--directory", str(root), "--steps", "2"]) == 0
    [(texts, live)] = trained
    return Distilled(shown.getvalue(), root / "from_hugging_face" / "seed5" / "self_distilled", texts, live)


def test_a_hugging_face_directory_becomes_a_self_distilled_one(example, task, distilled):
    assert "after" in distilled.shown and "selfdistill convert megatron-to-hf" in distilled.shown
    (tokenizer, before), (_, after) = example.load(task.hf), example.load(distilled.directory)
    architectures = json.loads((distilled.directory / "config.json").read_text())["architectures"]
    assert architectures == ["Qwen3ForCausalLM"]
    assert tokenizer("500-408:")["input_ids"] == [5, 0, 0, 10, 4, 0, 8, 16]
    assert before.state_dict().keys() == after.state_dict().keys()
    moved = [not torch.equal(tensor, after.state_dict()[name]) for name, tensor in before.state_dict().items()]
    assert all(moved)


def test_the_logits_of_the_directory_are_those_of_the_live_model_and_not_those_of_the_start(example, task, distilled):
    assert example.largest_difference(distilled.directory, distilled.texts, distilled.live) <= 1e-4
    assert example.largest_difference(task.hf, distilled.texts, distilled.live) > 1e-2
