# Copyright (c) 2026 the megatron_selfdistill authors. Apache-2.0.
"""The config.json that vLLM builds the trainer's model from."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import models
import pytest

from megatron_selfdistill.config import CheckpointConfig, Config, ParallelConfig, RolloutConfig
from megatron_selfdistill.errors import CheckpointError, ConfigError
from megatron_selfdistill.interop.hf.mapping import FAMILIES

MODEL = models.model_config("tied")
MISTRAL = models.model_config("gqa")


def described(config: Config, vocab_size: int, run_dir: Path) -> tuple[dict[str, Any], list[str]] | str:
    """Return this rank's config.json and Hugging Face names of the tensors, or the error's message."""
    from megatron_selfdistill.distributed.ranks import initialize
    from megatron_selfdistill.engines.vllm.hf_directory import engine_directory

    grid = initialize(ParallelConfig(), seed=1)
    try:
        directory, rules = engine_directory(config, vocab_size, run_dir, grid)
    except (ConfigError, CheckpointError) as error:
        return str(error)
    assert [path.name for path in directory.iterdir()] == ["config.json"]
    return json.loads((directory / "config.json").read_text()), [name for rule in rules for name in rule.hf_names]


def carried(directory: Path, **changes: Any) -> Path:
    """Return a checkpoint whose Hugging Face assets hold a config.json of `MODEL`."""
    from megatron_selfdistill.interop.hf.mapping import family_of_model

    config = {**family_of_model(MODEL).hf_config(MODEL, "bfloat16"), "bos_token_id": 7, **changes}
    (directory / "huggingface").mkdir(parents=True)
    (directory / "huggingface" / "config.json").write_text(json.dumps(config))
    return directory


def loading(checkpoint: Path, **changes: Any) -> Config:
    return Config(model=MODEL, checkpoint=CheckpointConfig(load=str(checkpoint)), **changes)


def test_without_any_config_json_one_is_made_that_names_the_family_the_sizes_and_the_type(ranks, tmp_path):
    config = Config(model=replace(MODEL, vocab_size=None))
    first, second = ranks.run(described, config, 61, tmp_path, world_size=2)
    assert first == second
    made, names = first
    assert made["architectures"] == ["Qwen2ForCausalLM"] and made["vocab_size"] == 61
    assert made["hidden_size"] == 32 and made["tie_word_embeddings"] and made["torch_dtype"] == "bfloat16"
    assert "model.embed_tokens.weight" in names and "lm_head.weight" not in names


GPT_OSS = models.model_config(
    "yarn",
    num_layers=2,
    num_moe_experts=4,
    moe_ffn_hidden_size=32,
    add_bias_linear=True,
    activation="quick_gelu",
    max_position_embeddings=64,
    transformer={
        "window_size": [7, 0],
        "window_attn_skip_freq": 2,
        "softmax_type": "learnable",
        "activation_func_clamp_value": 7.0,
        "glu_linear_offset": 1.0,
    },
)


@pytest.mark.parametrize(
    ("changes", "word"),
    [({"window_attn_skip_freq": None}, "layer_types"), ({"activation_func_clamp_value": 5.0}, "swiglu_limit")],
)
def test_a_gpt_oss_that_vllm_would_compute_otherwise_is_refused(ranks, tmp_path, changes, word):
    ((found, names),) = ranks.run(described, Config(model=GPT_OSS), 61, tmp_path, world_size=1)
    assert found["architectures"] == ["GptOssForCausalLM"] and "model.layers.0.self_attn.sinks" in names
    other = replace(GPT_OSS, transformer=GPT_OSS.transformer | changes)
    (message,) = ranks.run(described, Config(model=other), 61, tmp_path, world_size=1)
    assert f"does not read {word} of this model" in message


def test_more_positions_than_the_table_of_vllms_yarn_holds_are_refused(ranks, tmp_path):
    yarn = models.model_config("yarn", max_position_embeddings=64)
    ((found, _),) = ranks.run(described, Config(model=yarn), 61, tmp_path, world_size=1)
    assert found["rope_scaling"]["factor"] == 4.0 and found["max_position_embeddings"] == 64
    longer = Config(model=replace(yarn, max_position_embeddings=65))
    (message,) = ranks.run(described, longer, 61, tmp_path, world_size=1)
    assert "exceeds the 64 positions of YaRN in vLLM" in message


def test_a_checkpoints_own_config_json_is_kept_but_for_vocabulary_type_and_quantisation(ranks, tmp_path):
    fp8 = {"quant_method": "fp8", "weight_block_size": [128, 128]}
    load = carried(tmp_path / "load", vocab_size=128, quantization_config=fp8)
    ((found, _),) = ranks.run(described, loading(load), 61, tmp_path / "run", world_size=1)
    assert found["bos_token_id"] == 7 and found["vocab_size"] == 61
    assert "quantization_config" not in found


def test_an_engine_gets_the_text_model_of_a_model_with_a_vision_tower(ranks, tmp_path):
    text = FAMILIES["MistralForCausalLM"].hf_config(MISTRAL, "bfloat16") | {"model_type": "mistral"}
    del text["architectures"]
    whole = {"architectures": ["Mistral3ForConditionalGeneration"], "model_type": "mistral3", "text_config": text}
    load = tmp_path / "load"
    (load / "huggingface").mkdir(parents=True)
    (load / "huggingface" / "config.json").write_text(json.dumps(whole | {"vision_config": {"hidden_size": 8}}))
    config = Config(model=MISTRAL, checkpoint=CheckpointConfig(load=str(load)))
    ((found, names),) = ranks.run(described, config, 61, tmp_path / "run", world_size=1)
    assert found["architectures"] == ["MistralForCausalLM"] and found["vocab_size"] == 61
    assert "vision_config" not in found and "model.norm.weight" in names


def test_a_resumed_run_finds_it_in_its_directory_and_hf_config_goes_first(ranks, tmp_path):
    run = carried(tmp_path / "run")
    other = carried(tmp_path / "other", bos_token_id=9) / "huggingface"
    config = Config(model=MODEL)
    ((found, _),) = ranks.run(described, config, 61, run, world_size=1)
    assert found["bos_token_id"] == 7
    config = replace(config, rollout=RolloutConfig(hf_config=str(other)))
    ((found, _),) = ranks.run(described, config, 61, run, world_size=1)
    assert found["bos_token_id"] == 9


def test_a_providers_model_is_what_its_config_json_says(ranks, tmp_path):
    provider = replace(MODEL, provider="some.module.model_provider", num_layers=9)
    config = Config(model=provider, rollout=RolloutConfig(hf_config=str(carried(tmp_path) / "huggingface")))
    ((found, names),) = ranks.run(described, config, 61, tmp_path / "run", world_size=1)
    assert found["num_hidden_layers"] == MODEL.num_layers
    assert sum(name.endswith("input_layernorm.weight") for name in names) == MODEL.num_layers


@pytest.mark.parametrize(
    ("fault", "expected"),
    [
        ("another model", "hidden_size would be 48 but the model has 32"),
        ("unknown", "which is not known here"),
        ("provider", "name a directory with its Hugging Face config.json in rollout.hf_config"),
        ("absent", "nowhere/config.json cannot be read, expected the config.json of a model"),
    ],
)
def test_a_config_json_that_cannot_be_the_models_is_one_sentence_on_all_ranks(ranks, tmp_path, fault, expected):
    config = Config(model=MODEL)
    if fault == "another model":
        config = loading(carried(tmp_path / "load", hidden_size=48))
    elif fault == "unknown":
        config = loading(carried(tmp_path / "load", architectures=["OtherForCausalLM"]))
    elif fault == "provider":
        config = Config(model=replace(MODEL, provider="some.module.model_provider"))
    else:
        config = Config(model=MODEL, rollout=RolloutConfig(hf_config=str(tmp_path / "nowhere")))
    first, second = ranks.run(described, config, 61, tmp_path / "run", world_size=2)
    assert first == second
    assert expected in first
