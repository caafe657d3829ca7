# Copyright (c) 2026 the megatron_selfdistill authors. Apache-2.0.
"""A text model beside a vision tower converts alone, and the tensors of the vision tower return bit by bit."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import hf_models
import models
import pytest
import torch
from hf_contents import assert_same_tensors, config_of, tensors_of
from safetensors.torch import save_file
from torch import Tensor

from megatron_selfdistill.checkpoint.conversion import hf_to_megatron, megatron_to_hf
from megatron_selfdistill.checkpoint.describe import describe
from megatron_selfdistill.checkpoint.directory import HF_ASSETS
from megatron_selfdistill.checkpoint.formats.full_weights import open_weights
from megatron_selfdistill.checkpoint.peft_adapters import weight_rules
from megatron_selfdistill.checkpoint.run.external import load_weights
from megatron_selfdistill.config import ParallelConfig
from megatron_selfdistill.errors import CheckpointError, ConfigError
from megatron_selfdistill.model.hf.mapping import family_of, text_config

VISION = {
    "model_type": "pixtral",
    "hidden_size": 16,
    "intermediate_size": 20,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "head_dim": 8,
    "image_size": 28,
    "patch_size": 14,
}


def write(directory: Path, text_kind: str = "ministral3", tied: bool = False) -> Any:
    """Save a random Mistral 3 with the text model of a kind of `hf_models`; return it."""
    import transformers

    text = hf_models.hf_config(text_kind).to_dict() | {"pad_token_id": None}
    config = transformers.Mistral3Config(text_config=text, vision_config=VISION, tie_word_embeddings=tied)
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = transformers.Mistral3ForConditionalGeneration(config).eval()
        hf_models.randomise(model)
    model.save_pretrained(directory)
    return model


@pytest.mark.parametrize(("text_kind", "tied"), [("ministral3", False), ("ministral3", True), ("mistral", False)])
def test_text_and_vision_return_bit_by_bit_and_config_json_returns_whole(tmp_path, text_kind, tied):
    write(tmp_path / "hf", text_kind, tied)
    hf_to_megatron(tmp_path / "hf", tmp_path / "megatron")
    megatron_to_hf(tmp_path / "megatron", tmp_path / "back")
    assert_same_tensors(tmp_path / "hf", tmp_path / "back")
    assert config_of(tmp_path / "hf") == config_of(tmp_path / "back")
    assert any(name.startswith("vision_tower.") for name in tensors_of(tmp_path / "back"))
    assert describe(tmp_path / "hf")["layers"] == describe(tmp_path / "megatron" / "release")["layers"]


def loaded_logits(directory: Path) -> Tensor:
    config = config_of(directory)
    model = family_of(config).model_config(config)
    chunks, grid = models.build(model, ParallelConfig())
    load_weights(directory / "megatron", chunks, model.vocab_size)
    return hf_models.megatron_logits(chunks[0], grid, hf_models.SEQUENCES)


def test_the_converted_text_model_has_transformers_logits(ranks, tmp_path):
    original = write(tmp_path)
    hf_to_megatron(tmp_path, tmp_path / "megatron")
    (logits,) = ranks.run(loaded_logits, tmp_path, world_size=1)
    assert (logits - hf_models.hf_logits(original, hf_models.SEQUENCES)).abs().max() <= 1e-4


def text_checkpoint(hf: Path, out: Path) -> Path:
    """Write a checkpoint of the text model alone, such as a run saves; return it."""
    text = out / "text"
    text.mkdir(parents=True)
    prefix = "language_model."
    tensors = {n.removeprefix(prefix): t for n, t in tensors_of(hf).items() if n.startswith(prefix)}
    save_file(tensors, text / "model.safetensors", {"format": "pt"})
    (text / "config.json").write_text(json.dumps(dict(text_config(config_of(hf)))))
    release = hf_to_megatron(text, out / "megatron")
    shutil.rmtree(release / HF_ASSETS)
    return out / "megatron"


def test_the_checkpoint_of_a_run_takes_the_vision_tower_from_the_original_directory(tmp_path):
    write(tmp_path / "hf")
    trained = text_checkpoint(tmp_path / "hf", tmp_path / "run")
    megatron_to_hf(trained, tmp_path / "back", hf_config=tmp_path / "hf")
    assert_same_tensors(tmp_path / "hf", tmp_path / "back")
    (tmp_path / "assets").mkdir()
    shutil.copy(tmp_path / "hf" / "config.json", tmp_path / "assets")
    with pytest.raises(CheckpointError, match="has no weights: expected"):
        megatron_to_hf(trained, tmp_path / "none", hf_config=tmp_path / "assets")
    shutil.copytree(tmp_path / "assets", trained / "release" / HF_ASSETS)
    with pytest.raises(
        CheckpointError, match=r"has no vision_tower\.\* and multi_modal_projector.* set --hf-config to"
    ):
        megatron_to_hf(trained, tmp_path / "none")
    assert not (tmp_path / "none").exists()
    assert open_weights(trained).passthrough == {}


def test_adapters_alone_have_no_names_that_every_transformers_knows(tmp_path):
    write(tmp_path / "hf")
    hf_to_megatron(tmp_path / "hf", tmp_path / "megatron")
    with pytest.raises(ConfigError, match="PEFT's names of the modules of Mistral3ForConditionalGeneration depend on"):
        weight_rules(open_weights(tmp_path / "megatron"))


def test_a_text_model_of_another_type_is_refused(tmp_path):
    write(tmp_path)
    config = config_of(tmp_path)
    config["text_config"]["model_type"] = "llama"
    with pytest.raises(ConfigError, match="model_type='llama': only mistral and ministral3 are known here"):
        family_of(config).model_config(config)


def test_a_text_model_that_is_refused_alone_is_refused_with_a_vision_tower(tmp_path):
    write(tmp_path)
    config = config_of(tmp_path)
    config["text_config"]["max_position_embeddings"] = 128
    with pytest.raises(ConfigError, match="by which queries grow from position 64"):
        family_of(config).model_config(config)


def test_the_text_model_has_a_config_json_of_its_own_and_others_are_text_already(tmp_path):
    write(tmp_path)
    config = config_of(tmp_path)
    text = text_config(config)
    assert text["architectures"] == ["Ministral3ForCausalLM"] and text["hidden_size"] == 36
    assert family_of(text).model_config(text) == family_of(config).model_config(config)
    assert text_config(text) is text


def test_a_tensor_of_neither_part_is_refused(tmp_path):
    write(tmp_path / "hf")
    tensors = tensors_of(tmp_path / "hf") | {"audio_tower.weight": torch.zeros(2)}
    save_file(tensors, tmp_path / "hf" / "model.safetensors", {"format": "pt"})
    with pytest.raises(ConfigError, match=r"audio_tower\.weight is unexpected"):
        hf_to_megatron(tmp_path / "hf", tmp_path / "megatron")
