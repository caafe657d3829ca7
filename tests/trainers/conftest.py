# Copyright (c) 2026 the megatron_selfdistill authors. Apache-2.0.
"""The tiny model whose gradients the trainers of examples/trainers/ and the pipeline of this project compare."""

from __future__ import annotations

import os
import sys
from pathlib import Path

import pytest
import trainer_gradients
from torch import Tensor

sys.path.insert(0, str(Path(__file__).resolve().parents[2] / "examples"))  # as `python examples/...` does

OF_TRL = ["test_trl_trainer.py", "test_published_templates.py", "test_peers_step.py"]
collect_ignore = [] if os.environ.get("SELFDISTILL_TEST_TRL") == "1" else OF_TRL  # make test-trainers brings TRL


@pytest.fixture(scope="session")
def tiny_qwen3(tmp_path_factory) -> Path:
    """Return the Hugging Face directory of a random Qwen3."""
    return trainer_gradients.write_model(tmp_path_factory.mktemp("qwen3"))


@pytest.fixture(scope="session")
def tiny_chat_qwen3(tmp_path_factory) -> Path:
    """Return the same with a tokenizer that has a chat template."""
    directory = trainer_gradients.write_model(tmp_path_factory.mktemp("chat"))
    tokenizer = trainer_gradients.word_tokenizer()
    tokenizer.chat_template = "{% for message in messages %}{{ message['content'] }} {% endfor %}"
    tokenizer.save_pretrained(directory)
    return directory


@pytest.fixture(scope="session")
def expected(ranks, tiny_qwen3) -> dict[str, Tensor]:
    """Return the gradient of every tensor of the directory, by the pipeline of this project on one rank."""
    (gradients,) = ranks.run(trainer_gradients.by_the_pipeline, tiny_qwen3, world_size=1)
    return gradients
