# Copyright (c) 2026 the megatron_selfdistill authors. Apache-2.0.
"""The family DeepSeek-V3, Kimi-K2 and Moonlight: latent attention, and the experts of `sigmoid_router`."""

from __future__ import annotations

from typing import Any

from megatron_selfdistill.config import ModelConfig
from megatron_selfdistill.errors import ConfigError
from megatron_selfdistill.model.hf.dense import COMMON_DEFAULTS, read_common, write_common
from megatron_selfdistill.model.hf.family import Family, HFConfig
from megatron_selfdistill.model.hf.rope import read_rope, write_yarn, yarn_fields
from megatron_selfdistill.model.hf.sigmoid_router import read_experts, write_experts

_LATENT_EPSILON = 1e-6


def _read(config: HFConfig) -> ModelConfig:
    _require_expressible(config)
    rope = read_rope(config)
    experts, transformer = read_experts(config)
    attention = {
        "multi_latent_attention": True,
        "q_lora_rank": config["q_lora_rank"],
        "kv_lora_rank": config["kv_lora_rank"],
        "qk_head_dim": config["qk_nope_head_dim"],
        "qk_pos_emb_head_dim": config["qk_rope_head_dim"],
        "v_head_dim": config["v_head_dim"],
        **yarn_fields(rope, config),
    }
    return read_common(
        config,
        num_query_groups=config["num_attention_heads"],
        kv_channels=config["qk_nope_head_dim"],
        rotary_base=rope.base,
        qk_layernorm=True,
        # transformers has this epsilon in the norms of the latents, whatever rms_norm_eps says.
        latent_layernorm_epsilon=None if config["rms_norm_eps"] == _LATENT_EPSILON else _LATENT_EPSILON,
        **experts,
        transformer=attention | transformer,
    )


def _require_expressible(config: HFConfig) -> None:
    """Raise ConfigError for a config.json that Megatron Core cannot express, or that programs read differently."""
    config.require("attention_bias", (False, None), "biases are not known here")
    config.require("scoring_func", ("sigmoid", None), "DeepseekV3ForCausalLM always takes the sigmoid of the scores")
    config.require(
        "topk_method", ("noaux_tc", None), "DeepseekV3ForCausalLM always chooses experts with biases (noaux_tc)"
    )
    config.require("moe_layer_freq", (1, None), "transformers has experts in every layer after the dense ones")
    config.require("rope_interleave", (True, None), "Megatron rotates neighbouring channels")
    config.require("num_key_value_heads", (None, config["num_attention_heads"]), "expected num_attention_heads")
    config.require("head_dim", (None, config["qk_rope_head_dim"]), "expected qk_rope_head_dim, whose channels rotate")


def _write(arch: dict[str, Any]) -> dict[str, Any]:
    if not arch["multi_latent_attention"]:
        raise ConfigError("DeepseekV3ForCausalLM has multi-latent attention, this model has not")
    config = write_common(arch) | write_yarn(arch) | write_experts(arch)
    del config["head_dim"]  # transformers derives it: the rotary channels
    return config | {
        "attention_bias": False,
        "q_lora_rank": arch["q_lora_rank"],
        "kv_lora_rank": arch["kv_lora_rank"],
        "qk_nope_head_dim": arch["qk_head_dim"],
        "qk_rope_head_dim": arch["qk_pos_emb_head_dim"],
        "v_head_dim": arch["v_head_dim"],
        "scoring_func": "sigmoid",
        "topk_method": "noaux_tc",
        "moe_layer_freq": 1,
    }


DEEPSEEK_V3 = Family(
    "DeepseekV3ForCausalLM",
    "deepseek_v3",
    _read,
    _write,
    COMMON_DEFAULTS
    | {
        "num_key_value_heads": None,
        "moe_intermediate_size": 2048,
        "n_shared_experts": 1,
        "n_routed_experts": 256,
        "routed_scaling_factor": 2.5,
        "kv_lora_rank": 512,
        "q_lora_rank": 1536,
        "qk_rope_head_dim": 64,
        "v_head_dim": 128,
        "qk_nope_head_dim": 128,
        "n_group": 8,
        "topk_group": 4,
        "num_experts_per_tok": 8,
        "first_k_dense_replace": 3,
        "norm_topk_prob": True,
        "scoring_func": None,
        "topk_method": None,
        "rope_interleave": True,
        "moe_layer_freq": None,
        "num_nextn_predict_layers": 1,
    },
    published_types=("kimi_k2",),
    models="DeepSeek-V3, V3.1 and R1; Kimi-K2; Moonlight",
    limits="`scoring_func=sigmoid`, `topk_method=noaux_tc`, `norm_topk_prob=true`, `moe_layer_freq=1`; no 4-bit "
    "weights",
)
