# Copyright (c) 2026 the megatron_selfdistill authors. Apache-2.0.
"""The families Mixtral and Qwen3-MoE: the common decoder with a softmax router over experts."""

from __future__ import annotations

from typing import Any

from megatron_selfdistill.config import ModelConfig
from megatron_selfdistill.errors import ConfigError
from megatron_selfdistill.model.hf.decoder import TensorNames
from megatron_selfdistill.model.hf.dense import COMMON_DEFAULTS, read_common, write_common
from megatron_selfdistill.model.hf.family import Family, HFConfig
from megatron_selfdistill.model.hf.rope import read_rope, rotary_fields, write_rotary
from megatron_selfdistill.model.hf.sigmoid_router import require_normalised
from megatron_selfdistill.model.hf.sliding_windows import every_layer, every_layer_if_used, window_keys, write_window


def _read_mixtral(config: HFConfig) -> ModelConfig:
    require_normalised(config)
    return read_common(
        config,
        transformer=window_keys(config, every_layer(config)),
        num_moe_experts=config["num_local_experts"],
        moe_router_topk=config["num_experts_per_tok"],
        moe_ffn_hidden_size=config["intermediate_size"],
        **rotary_fields(read_rope(config), config),
    )


def _write_mixtral(arch: dict[str, Any]) -> dict[str, Any]:
    require_experts(arch)
    return {
        **write_common(arch),
        **write_rotary(arch),
        "num_local_experts": arch["num_moe_experts"],
        "num_experts_per_tok": arch["moe_router_topk"],
        "sliding_window": write_window(arch),
    }


def _read_qwen3_moe(config: HFConfig) -> ModelConfig:
    config.require("attention_bias", (False, None), "biases are not known here")
    transformer = window_keys(config, every_layer_if_used(config))
    transformer |= sparse_layers(config, otherwise=": call it Qwen3ForCausalLM") | softmax_router(config)
    num_experts = config.given("num_local_experts") or config["num_experts"]  # transformers 5 renames it
    return read_common(
        config,
        qk_layernorm=True,
        num_moe_experts=num_experts,
        moe_router_topk=config["num_experts_per_tok"],
        moe_ffn_hidden_size=config["moe_intermediate_size"],
        transformer=transformer,
        **rotary_fields(read_rope(config), config),
    )


def sparse_layers(config: HFConfig, otherwise: str) -> dict[str, Any]:
    """Return the keys of ``model.transformer`` that say which layers of a Qwen model have experts.

    Raises: ConfigError where no layer has experts; the message ends with ``otherwise``, which says what to do then.
    """
    step, dense = config["decoder_sparse_step"], config["mlp_only_layers"] or []
    is_moe = [int(i not in dense and (i + 1) % step == 0) for i in range(config["num_hidden_layers"])]
    if not any(is_moe):
        raise ConfigError(f"config.json of {config.architecture} has no layer with experts{otherwise}")
    return {} if all(is_moe) else {"moe_layer_freq": is_moe}


def softmax_router(config: HFConfig) -> dict[str, Any]:
    """Return the keys of ``model.transformer`` for ``norm_topk_prob`` of a softmax router."""
    # A softmax over the chosen experts alone would sum to 1.
    if not config["norm_topk_prob"]:
        return {"moe_router_pre_softmax": True}
    require_normalised(config)
    return {}


def _write_qwen3_moe(arch: dict[str, Any]) -> dict[str, Any]:
    require_experts(arch)
    return {
        **write_common(arch),
        **write_rotary(arch),
        "attention_bias": False,
        **write_experts(arch),
        "use_sliding_window": arch["window_size"] is not None,
        **({} if arch["window_size"] is None else {"sliding_window": write_window(arch)}),
    }


def write_experts(arch: dict[str, Any]) -> dict[str, Any]:
    """Return the fields of config.json for a Qwen model's experts: their sizes, their router and their layers."""
    return {
        **write_expert_sizes(arch),
        "norm_topk_prob": not arch["moe_router_pre_softmax"],
        "decoder_sparse_step": 1,
        "mlp_only_layers": [layer for layer, moe in enumerate(arch["moe_layer_freq"]) if not moe],
    }


def write_expert_sizes(arch: dict[str, Any]) -> dict[str, Any]:
    """Return the fields of config.json for the number of a Qwen model's experts, the chosen ones and their width."""
    return {
        "num_experts": arch["num_moe_experts"],
        "num_experts_per_tok": arch["moe_router_topk"],
        "moe_intermediate_size": arch["moe_ffn_hidden_size"],
    }


def require_experts(arch: dict[str, Any]) -> None:
    """Raise ConfigError for a dense model."""
    if arch["num_moe_experts"] is None:
        raise ConfigError("this model has no experts")


MIXTRAL = Family(
    "MixtralForCausalLM",
    "mixtral",
    _read_mixtral,
    _write_mixtral,
    COMMON_DEFAULTS
    | {
        "num_key_value_heads": 8,
        "rms_norm_eps": 1e-5,
        "rope_theta": 1e6,
        "num_local_experts": 8,
        "num_experts_per_tok": 2,
    },
    TensorNames(block="block_sparse_moe", gate="w1", up="w3", down="w2"),
    models="Mixtral 8x7B and 8x22B",
    limits="a sliding window in every layer, or none",
)
QWEN3_MOE = Family(
    "Qwen3MoeForCausalLM",
    "qwen3_moe",
    _read_qwen3_moe,
    _write_qwen3_moe,
    COMMON_DEFAULTS
    | {
        "num_key_value_heads": 4,
        "num_experts": 128,
        "num_experts_per_tok": 8,
        "moe_intermediate_size": 768,
        "norm_topk_prob": False,
        "decoder_sparse_step": 1,
        "mlp_only_layers": None,
        "sliding_window": 4096,
    },
    models="Qwen3-30B-A3B, Qwen3-235B-A22B",
    limits="no biases; a sliding window in every layer, or none; dense layers between the others are allowed",
)
