# Copyright (c) 2026 the megatron_selfdistill authors. Apache-2.0.
"""The dense families: Llama 2 and 3, Mistral, Qwen2 (and 2.5), Qwen3, Phi-3 and 4, Seed-OSS and SmolLM3.

They are one decoder with several forms of config.json.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from megatron_selfdistill.config import ModelConfig
from megatron_selfdistill.errors import ConfigError
from megatron_selfdistill.interop.hf.family import Family, HFConfig
from megatron_selfdistill.interop.hf.rope import llama3_fields, read_rope, rotary_fields, write_llama3, write_rotary
from megatron_selfdistill.interop.hf.rules import Rule, fused
from megatron_selfdistill.interop.hf.sliding_windows import (
    listed_layers,
    qwen_layers,
    require_layer_types,
    window_keys,
    write_qwen_windows,
    write_window,
)


def read_common(config: HFConfig, **fields: Any) -> ModelConfig:
    """Return the model of the fields that all families share; ``fields`` add to them or replace them.

    Raises: ConfigError for another activation than SiLU, and for ``layer_types`` of another model.
    """
    config.require("hidden_act", ("silu", "swish"), "only silu, which is also called swish, is known here")
    heads = config["num_attention_heads"]
    common: dict[str, Any] = {
        "vocab_size": config["vocab_size"],
        "num_layers": config["num_hidden_layers"],
        "hidden_size": config["hidden_size"],
        "ffn_hidden_size": config["intermediate_size"],
        "num_attention_heads": heads,
        "num_query_groups": config["num_key_value_heads"] or heads,
        "kv_channels": config["head_dim"] or config["hidden_size"] // heads,
        "max_position_embeddings": config["max_position_embeddings"],
        "layernorm_epsilon": config["rms_norm_eps"],
        "share_embeddings_and_output_weights": config["tie_word_embeddings"],
        "init_method_std": config["initializer_range"],
    }
    model = ModelConfig(**(common | fields))
    require_layer_types(config, model)
    return model


def expert_fields(config: HFConfig, count: str = "num_experts", width: str = "moe_intermediate_size") -> dict[str, Any]:
    """Return the fields of `ModelConfig` for the number of experts, the chosen ones and their width."""
    return {
        "num_moe_experts": config[count],
        "moe_router_topk": config["num_experts_per_tok"],
        "moe_ffn_hidden_size": config[width],
    }


def write_common(arch: dict[str, Any]) -> dict[str, Any]:
    """Return the shared fields of config.json for ``arch``: the inverse of `read_common`."""
    return {
        "vocab_size": arch["vocab_size"],
        "num_hidden_layers": arch["num_layers"],
        "hidden_size": arch["hidden_size"],
        "intermediate_size": arch["ffn_hidden_size"] or arch["moe_ffn_hidden_size"],
        "num_attention_heads": arch["num_attention_heads"],
        "num_key_value_heads": arch["num_query_groups"] or arch["num_attention_heads"],
        "head_dim": arch["kv_channels"],
        "hidden_act": "silu",
        "max_position_embeddings": arch["max_position_embeddings"],
        "rms_norm_eps": arch["layernorm_epsilon"],
        "tie_word_embeddings": arch["share_embeddings_and_output_weights"],
    }


def _reader(
    *, windows: Callable[[HFConfig], list[bool]], bias: bool, **fields: Any
) -> Callable[[HFConfig], ModelConfig]:
    """Return the reader of a dense family; ``windows`` returns whether each layer, or all layers, have the window.

    ``bias``: whether q, k and v always have biases, as in Qwen2, whose code reads neither ``attention_bias`` nor
    ``mlp_bias``.
    """

    def read(config: HFConfig) -> ModelConfig:
        for name in () if bias else ("attention_bias", "mlp_bias"):
            config.require(name, (False, None), "biases besides those of Qwen2's q, k and v are not known here")
        transformer = window_keys(config, windows(config))
        fields_of_rope = rotary_fields(read_rope(config), config)
        return read_common(config, add_qkv_bias=bias, transformer=transformer, **fields, **fields_of_rope)

    return read


def write_decoder(arch: dict[str, Any]) -> dict[str, Any]:
    """Return the shared fields of config.json for ``arch``, and those of ordinary rotary positions."""
    return write_common(arch) | write_rotary(arch)


def _write_without_head_dim(arch: dict[str, Any]) -> dict[str, Any]:
    """Return a config.json without ``head_dim`` where transformers' Qwen2 derives it; old versions do not read it."""
    config = write_decoder(arch) | write_qwen_windows(arch)
    if config["head_dim"] is not None and config["head_dim"] * config["num_attention_heads"] == config["hidden_size"]:
        del config["head_dim"]
    return config


LLAMA = Family(
    "LlamaForCausalLM",
    "llama",
    _reader(windows=lambda _: [False], bias=False),
    lambda arch: write_decoder(arch) | {"attention_bias": False, "mlp_bias": False},
)
MISTRAL = Family(
    "MistralForCausalLM",
    "mistral",
    # Ministral has layer_types.
    _reader(windows=lambda config: [True] if config["layer_types"] is None else listed_layers(config), bias=False),
    lambda arch: write_decoder(arch) | {"sliding_window": write_window(arch)},  # else transformers has one
)
QWEN2 = Family("Qwen2ForCausalLM", "qwen2", _reader(windows=qwen_layers, bias=True), _write_without_head_dim)
QWEN3 = Family(
    "Qwen3ForCausalLM",
    "qwen3",
    _reader(windows=qwen_layers, bias=False, qk_layernorm=True),
    lambda arch: write_decoder(arch) | write_qwen_windows(arch) | {"attention_bias": False},
)


def _read_phi(config: HFConfig) -> ModelConfig:
    rope = read_rope(config)
    if rope.kind != "default":
        raise config.error(f"has rope_type={rope.kind!r}: only default is known here, as longrope varies by length")
    return read_common(config, transformer=window_keys(config), **llama3_fields(rope, config))


def _write_phi(arch: dict[str, Any]) -> dict[str, Any]:
    if arch["rope_scaling_factor"] is not None:
        raise ConfigError("Phi3ForCausalLM has no llama3 rope")
    # transformers' default pad_token_id lies outside of a small vocabulary.
    return write_common(arch) | write_llama3(arch) | {"sliding_window": write_window(arch), "pad_token_id": None}


def _fuse_phi(rule: Rule) -> Rule:
    first = rule.hf_names[0]
    for projection, name in (("q_proj", "qkv_proj"), ("gate_proj", "gate_up_proj")):
        if f".{projection}." in first:
            return fused(rule, first.replace(projection, name))
    return rule


PHI3 = Family("Phi3ForCausalLM", "phi3", _read_phi, _write_phi, adapt=_fuse_phi)


def _read_seed_oss(config: HFConfig) -> ModelConfig:
    for name in ("attention_out_bias", "mlp_bias"):
        config.require(name, (False,), "Megatron has biases of q, k and v alone, or of all linear layers")
    config.require("attention_bias", (True, False), "expected true or false")
    return read_common(config, add_qkv_bias=config["attention_bias"], **rotary_fields(read_rope(config), config))


def _write_seed_oss(arch: dict[str, Any]) -> dict[str, Any]:
    return {
        **write_decoder(arch),
        "attention_bias": arch["add_qkv_bias"],
        "attention_out_bias": False,
        "mlp_bias": False,
    }


SEED_OSS = Family("SeedOssForCausalLM", "seed_oss", _read_seed_oss, _write_seed_oss)


def _read_smollm(config: HFConfig) -> ModelConfig:
    for name in ("attention_bias", "mlp_bias"):
        config.require(name, (False, None), "biases are not known here")
    has_rope = _layers_with_rope_smollm(config)
    sliding = [bool(config["use_sliding_window"] and not rope) for rope in has_rope]
    transformer = window_keys(config, sliding if config["layer_types"] is None else listed_layers(config))
    if not all(has_rope):
        transformer["no_rope_freq"] = [1 - rope for rope in has_rope]
    return read_common(config, transformer=transformer, **rotary_fields(read_rope(config), config))


def _layers_with_rope_smollm(config: HFConfig) -> list[int]:
    """Return 1 for each layer with rotary positions and 0 for each other layer."""
    num_layers, given = config["num_hidden_layers"], config["no_rope_layers"]
    if given is None:
        return [int((layer + 1) % config["no_rope_layer_interval"] != 0) for layer in range(num_layers)]
    if len(given) != num_layers:
        raise config.error(
            f"has {len(given)} entries in no_rope_layers, expected one for each of the {num_layers} layers"
        )
    return [int(bool(rope)) for rope in given]


def _write_smollm(arch: dict[str, Any]) -> dict[str, Any]:
    without = arch["no_rope_freq"] or [0] * arch["num_layers"]
    return {
        **write_decoder(arch),
        "attention_bias": False,
        "mlp_bias": False,
        "no_rope_layers": [1 - skips for skips in without],
        "use_sliding_window": False,
        "sliding_window": None,
        **write_qwen_windows(arch),
        "pad_token_id": None,  # transformers' default lies outside of a small vocabulary
    }


SMOLLM3 = Family("SmolLM3ForCausalLM", "smollm3", _read_smollm, _write_smollm, {"rope_theta": 2000000.0})
