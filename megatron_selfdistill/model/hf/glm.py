# Copyright (c) 2026 the megatron_selfdistill authors. Apache-2.0.
"""The family GLM-4.5, 4.6 and 4.7: grouped queries with partial rotation, and the experts of DeepSeek-V3."""

from __future__ import annotations

from typing import Any

from megatron_selfdistill.config import ModelConfig
from megatron_selfdistill.model.hf.dense import COMMON_DEFAULTS, read_common, write_common
from megatron_selfdistill.model.hf.family import Family, HFConfig
from megatron_selfdistill.model.hf.rope import read_rope, rotary_fields, write_rotary
from megatron_selfdistill.model.hf.sigmoid_router import read_experts, write_experts


def _read(config: HFConfig) -> ModelConfig:
    experts, transformer = read_experts(config)
    return read_common(
        config,
        **rotary_fields(read_rope(config, partial=True), config),
        add_qkv_bias=bool(config["attention_bias"]),
        qk_layernorm=bool(config["use_qk_norm"]),
        **experts,
        transformer=transformer,
    )


def _write(arch: dict[str, Any]) -> dict[str, Any]:
    return {
        **write_common(arch),
        **write_rotary(arch),
        **write_experts(arch),
        "partial_rotary_factor": arch["rotary_percent"],
        "attention_bias": arch["add_qkv_bias"],
        "use_qk_norm": arch["qk_layernorm"],
    }


GLM4_MOE = Family(
    "Glm4MoeForCausalLM",
    "glm4_moe",
    _read,
    _write,
    COMMON_DEFAULTS
    | {
        "num_key_value_heads": 8,
        "rms_norm_eps": 1e-5,
        "partial_rotary_factor": 0.5,
        "use_qk_norm": False,
        "moe_intermediate_size": 1408,
        "n_shared_experts": 1,
        "n_routed_experts": 128,
        "routed_scaling_factor": 1.0,
        "n_group": 1,
        "topk_group": 1,
        "num_experts_per_tok": 8,
        "first_k_dense_replace": 1,
        "norm_topk_prob": True,
        "num_nextn_predict_layers": 1,
    },
    models="GLM-4.5, 4.6 and 4.7, with and without Air",
    limits="`norm_topk_prob=true`, no YaRN; the layer for multi-token prediction is kept for the way back, with or "
    "without its copies of embedding and output layer, and not trained",
)
