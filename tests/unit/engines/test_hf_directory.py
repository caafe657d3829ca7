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


def described(configs: list[Config], run_dir: Path) -> list[tuple[dict[str, Any], list[str]] | str]:
    """Return, for each configuration, this rank's config.json and Hugging Face names, or the error's message."""
    from megatron_selfdistill.distributed.ranks import initialize
    from megatron_selfdistill.engines.vllm.hf_directory import engine_directory

    grid, found = initialize(ParallelConfig(), seed=1), []
    for config in configs:
        try:
            directory, rules = engine_directory(config, 61, run_dir, grid)
        except (ConfigError, CheckpointError) as error:
            found.append(str(error))
            continue
        assert [path.name for path in directory.iterdir()] == ["config.json"]
        made = json.loads((directory / "config.json").read_text())
        found.append((made, [name for rule in rules for name in rule.hf_names]))
    return found


@pytest.fixture
def describe(ranks, tmp_path):
    """Return a function that describes models on one rank, by default with an empty run directory."""
    return lambda *configs, run=tmp_path / "run": ranks.run(described, list(configs), run, world_size=1)[0]


def carried(directory: Path, **changes: Any) -> Path:
    """Return a checkpoint whose Hugging Face assets hold a config.json of `MODEL`."""
    from megatron_selfdistill.interop.hf.mapping import family_of_model

    config = {**family_of_model(MODEL).hf_config(MODEL, "bfloat16"), "bos_token_id": 7, **changes}
    (directory / "huggingface").mkdir(parents=True)
    (directory / "huggingface" / "config.json").write_text(json.dumps(config))
    return directory


def loading(checkpoint: Path, **changes: Any) -> Config:
    return Config(model=MODEL, checkpoint=CheckpointConfig(load=str(checkpoint)), **changes)


def test_without_any_config_json_one_is_made_that_names_the_family_the_sizes_and_the_type(describe):
    [(made, names)] = describe(Config(model=replace(MODEL, vocab_size=None)))
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
        **{"window_size": [7, 0], "window_attn_skip_freq": 2, "softmax_type": "learnable"},
        **{"activation_func_clamp_value": 7.0, "glu_linear_offset": 1.0},
    },
)


def test_what_vllm_would_compute_otherwise_is_refused(describe):
    yarn = models.model_config("yarn", max_position_embeddings=64)
    others = {"window_attn_skip_freq": None}, {"activation_func_clamp_value": 5.0}
    refused = [replace(GPT_OSS, transformer=GPT_OSS.transformer | other) for other in others]
    refused += [replace(yarn, max_position_embeddings=65)]
    (oss, names), (small, _), *messages = describe(*(Config(model=model) for model in (GPT_OSS, yarn, *refused)))
    assert oss["architectures"] == ["GptOssForCausalLM"] and "model.layers.0.self_attn.sinks" in names
    assert small["rope_scaling"]["factor"] == 4.0 and small["max_position_embeddings"] == 64
    for message, word in zip(messages, ("layer_types", "swiglu_limit", "64 positions"), strict=True):
        assert word in message


def test_a_checkpoints_own_config_json_is_kept_but_for_vocabulary_type_and_quantisation(describe, tmp_path):
    fp8 = {"quant_method": "fp8", "weight_block_size": [128, 128]}
    [(found, _)] = describe(loading(carried(tmp_path / "load", vocab_size=128, quantization_config=fp8)))
    assert found["bos_token_id"] == 7 and found["vocab_size"] == 61
    assert "quantization_config" not in found


def test_an_engine_gets_the_text_model_of_a_model_with_a_vision_tower(describe, tmp_path):
    text = FAMILIES["MistralForCausalLM"].hf_config(MISTRAL, "bfloat16") | {"model_type": "mistral"}
    del text["architectures"]
    whole = {"architectures": ["Mistral3ForConditionalGeneration"], "model_type": "mistral3", "text_config": text}
    load = tmp_path / "load"
    (load / "huggingface").mkdir(parents=True)
    (load / "huggingface" / "config.json").write_text(json.dumps(whole | {"vision_config": {"hidden_size": 8}}))
    [(found, names)] = describe(Config(model=MISTRAL, checkpoint=CheckpointConfig(load=str(load))))
    assert found["architectures"] == ["MistralForCausalLM"] and found["vocab_size"] == 61
    assert "vision_config" not in found and "model.norm.weight" in names


def test_a_resumed_run_finds_it_in_its_directory_and_hf_config_goes_first(describe, tmp_path):
    run, other = carried(tmp_path / "run"), carried(tmp_path / "other", bos_token_id=9) / "huggingface"
    configs = Config(model=MODEL), Config(model=MODEL, rollout=RolloutConfig(hf_config=str(other)))
    assert [found["bos_token_id"] for config in configs for found, _ in describe(config, run=run)] == [7, 9]


def test_a_providers_model_is_what_its_config_json_says(describe, tmp_path):
    provider = replace(MODEL, provider="some.module.model_provider", num_layers=9)
    [(found, names)] = describe(
        Config(model=provider, rollout=RolloutConfig(hf_config=str(carried(tmp_path) / "huggingface")))
    )
    assert found["num_hidden_layers"] == MODEL.num_layers
    assert sum(name.endswith("input_layernorm.weight") for name in names) == MODEL.num_layers


def test_a_config_json_that_cannot_be_the_models_is_refused_on_all_ranks(ranks, tmp_path):
    refused = {
        "hidden_size would be 48": loading(carried(tmp_path / "load", hidden_size=48)),
        "not known": loading(carried(tmp_path / "unknown", architectures=["OtherForCausalLM"])),
        "rollout.hf_config": Config(model=replace(MODEL, provider="some.module.model_provider")),
        "nowhere/config.json": Config(model=MODEL, rollout=RolloutConfig(hf_config=str(tmp_path / "nowhere"))),
    }
    first, second = ranks.run(described, list(refused.values()), tmp_path / "run", world_size=2)
    assert first == second
    assert all(word in message for word, message in zip(refused, first, strict=True))
