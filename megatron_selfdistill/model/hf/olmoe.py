# Copyright (c) 2026 the megatron_selfdistill authors. Apache-2.0.
"""The family OLMoE: a softmax router, with queries and keys normalised over all heads together."""

from __future__ import annotations

from typing import Any

from megatron_selfdistill.config import ModelConfig
from megatron_selfdistill.errors import ConfigError
from megatron_selfdistill.model.hf.dense import COMMON_DEFAULTS, read_common, write_common
from megatron_selfdistill.model.hf.experts import require_experts, softmax_router
from megatron_selfdistill.model.hf.family import Family, HFConfig
from megatron_selfdistill.model.hf.rope import read_rope, rotary_fields, write_rotary


def _read(config: HFConfig) -> ModelConfig:
    config.require("attention_bias", (False, None), "biases are not known here")
    config.require("clip_qkv", (None,), "Megatron does not clip queries, keys and values")
    channels = config["hidden_size"] // config["num_attention_heads"]
    config.require("head_dim", (None, channels), f"expected hidden_size / num_attention_heads, which is {channels}")
    config.require("sliding_window", (None,), "transformers applies it in some of its kernels only")
    return read_common(
        config,
        qk_layernorm_all_heads=True,
        num_moe_experts=config["num_experts"],
        moe_router_topk=config["num_experts_per_tok"],
        moe_ffn_hidden_size=config["intermediate_size"],
        transformer=softmax_router(config),
        **rotary_fields(read_rope(config), config),
    )


def _write(arch: dict[str, Any]) -> dict[str, Any]:
    require_experts(arch)
    if arch["kv_channels"] != arch["hidden_size"] // arch["num_attention_heads"]:
        raise ConfigError(f"OlmoeForCausalLM has no heads of {arch['kv_channels']} channels")
    config = write_common(arch) | write_rotary(arch)
    del config["head_dim"]  # transformers derives it
    return config | {
        "attention_bias": False,
        "clip_qkv": None,
        "num_experts": arch["num_moe_experts"],
        "num_experts_per_tok": arch["moe_router_topk"],
        "intermediate_size": arch["moe_ffn_hidden_size"],
        "norm_topk_prob": not arch["moe_router_pre_softmax"],
    }


OLMOE = Family(
    "OlmoeForCausalLM",
    "olmoe",
    _read,
    _write,
    COMMON_DEFAULTS
    | {
        "rms_norm_eps": 1e-5,
        "clip_qkv": None,
        "num_experts": 64,
        "num_experts_per_tok": 8,
        "norm_topk_prob": False,
    },
    models="OLMoE-1B-7B",
    limits="no biases, no `clip_qkv`, no sliding window; `head_dim` is `hidden_size / num_attention_heads`",
)
