# Copyright (c) 2026 the megatron_selfdistill authors. Apache-2.0.
"""The family GPT-OSS: windows in every other layer, sinks, biases, and experts with a clamped GLU in fused tensors."""

from __future__ import annotations

from typing import Any

from megatron_selfdistill.config import ModelConfig
from megatron_selfdistill.errors import ConfigError
from megatron_selfdistill.interop.hf.decoder import TensorNames
from megatron_selfdistill.interop.hf.dense import read_common, write_decoder
from megatron_selfdistill.interop.hf.family import Family, HFConfig
from megatron_selfdistill.interop.hf.rope import read_rope, rotary_fields
from megatron_selfdistill.interop.hf.sigmoid_router import require_normalised
from megatron_selfdistill.interop.hf.sliding_windows import listed_layers, window_keys, write_layer_types, write_window

_YARN = {
    "rope_type": "yarn",
    "factor": 32.0,
    "beta_fast": 32.0,
    "beta_slow": 1.0,
    "truncate": False,
    "original_max_position_embeddings": 4096,
}
"""The positions of a config.json that names none."""


def _read(config: HFConfig) -> ModelConfig:
    config.require("attention_bias", (True,), "Megatron has biases in all linear layers, as published, or in none")
    config.require("swiglu_alpha", (1.702, None), "Megatron's quick_gelu is x * sigmoid(1.702 x)")
    require_normalised(config)
    num_experts = config.given("num_local_experts") or config.given("num_experts") or config["num_local_experts"]
    limit = 7.0 if config["swiglu_limit"] is None else config["swiglu_limit"]
    if config["layer_types"] is None:
        sliding = [layer % 2 == 0 for layer in range(config["num_hidden_layers"])]
    else:
        sliding = listed_layers(config)
    return read_common(
        config,
        add_bias_linear=True,
        activation="quick_gelu",
        num_moe_experts=num_experts,
        moe_router_topk=config["num_experts_per_tok"],
        moe_ffn_hidden_size=config["intermediate_size"],
        transformer={
            **window_keys(config, sliding),
            "softmax_type": "learnable",
            "activation_func_clamp_value": float(limit),
            "glu_linear_offset": 1.0,  # which transformers' code adds to the up projection
        },
        **rotary_fields(read_rope(config), config),
    )


def _write(arch: dict[str, Any]) -> dict[str, Any]:
    if arch["num_moe_experts"] is None or arch["activation"] != "quick_gelu":
        raise ConfigError("GptOssForCausalLM has experts with a clamped GLU, this model has not")
    sliding = arch["window_attn_skip_freq"] or [0] * arch["num_layers"]
    return {
        **write_decoder(arch),
        "attention_bias": True,
        "num_local_experts": arch["num_moe_experts"],
        "num_experts_per_tok": arch["moe_router_topk"],
        "sliding_window": write_window(arch),
        "layer_types": write_layer_types(sliding),
        "swiglu_limit": arch["activation_func_clamp_value"],
    }


GPT_OSS = Family(
    "GptOssForCausalLM",
    "gpt_oss",
    _read,
    _write,
    {"rope_theta": 150000.0, "rope_parameters": _YARN},
    TensorNames(gate="gate", router="router", fused=True),
    quantizations=("mxfp4",),
)
