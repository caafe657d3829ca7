# Copyright (c) 2026 the megatron_selfdistill authors. Apache-2.0.
"""The families of experts with a sigmoid router: DeepSeek-V3 with Kimi-K2 and Moonlight, GLM-4.5 to 4.7.

Both have leading dense layers, shared experts and groups of experts.  DeepSeek-V3 has latent attention; GLM-4.5 has
grouped queries with partial rotation.  Other families with a sigmoid router share its fields and its refusal.
"""

from __future__ import annotations

from typing import Any

from megatron_selfdistill.config import ModelConfig
from megatron_selfdistill.errors import ConfigError
from megatron_selfdistill.interop.hf.dense import expert_fields, read_common, write_common, write_decoder
from megatron_selfdistill.interop.hf.family import Family, HFConfig
from megatron_selfdistill.interop.hf.rope import read_rope, rotary_fields, write_yarn, yarn_fields

ROUTER_FIELDS = {"moe_router_enable_expert_bias": True, "moe_router_score_function": "sigmoid"}
"""The fields of `ModelConfig` that every sigmoid router with biases has."""

ROUTER_KEYS = {
    "moe_router_dtype": "fp32",
    "moe_router_bias_update_rate": 0.0,  # self-distillation does not balance experts
}
"""The keys of ``model.transformer`` that every sigmoid router with biases has."""
_LATENT_EPSILON = 1e-6


def read_experts(config: HFConfig) -> tuple[dict[str, Any], dict[str, Any]]:
    """Return the fields of `ModelConfig` for the experts, and the keys of ``model.transformer``.

    Raises: ConfigError for a config.json that Megatron Core cannot express.
    """
    _require_expressible(config)
    transformer = {
        "moe_router_topk_scaling_factor": config["routed_scaling_factor"],
        "moe_shared_expert_intermediate_size": config["n_shared_experts"] * config["moe_intermediate_size"],
        **ROUTER_KEYS,
    }
    num_layers, dense = config["num_hidden_layers"], config["first_k_dense_replace"]
    if dense:
        transformer["moe_layer_freq"] = [int(layer >= dense) for layer in range(num_layers)]
    if config["topk_group"] < config["n_group"]:
        transformer["moe_router_num_groups"] = config["n_group"]
        transformer["moe_router_group_topk"] = config["topk_group"]
    mtp_layers = "num_mtp_layers" if "num_mtp_layers" in config.values else "num_nextn_predict_layers"
    fields = {
        **expert_fields(config, "num_local_experts" if config.given("num_local_experts") else "n_routed_experts"),
        **ROUTER_FIELDS,
        "num_passthrough_mtp_layers": config[mtp_layers] or 0,
    }
    return fields, transformer


def _require_expressible(config: HFConfig) -> None:
    """Raise ConfigError for experts that Megatron Core cannot express.

    Megatron Core normalises the probabilities of more than one expert, and scores a group by its best
    ``topk // group_topk`` experts, while transformers takes the best two.
    """
    config.require("norm_topk_prob", (True,), "Megatron always normalises the probabilities of sigmoid routers")
    require_normalised(config)
    topk, groups = config["num_experts_per_tok"], config["topk_group"]
    if not config["n_shared_experts"]:
        raise ConfigError(f"config.json has n_shared_experts=0: {config.architecture} always has shared experts")
    if groups > config["n_group"]:
        raise ConfigError(f"config.json has topk_group={groups}, more than n_group={config['n_group']}")
    if groups < config["n_group"] and topk // groups != 2:
        raise ConfigError(
            f"config.json has num_experts_per_tok={topk} and topk_group={groups}: Megatron scores a group by its best "
            f"{topk // groups} experts, transformers by its best 2, so only a ratio of 2 is the same"
        )
    if config["first_k_dense_replace"] >= config["num_hidden_layers"]:
        raise ConfigError("config.json has no layer with experts (first_k_dense_replace >= num_hidden_layers)")


def require_normalised(config: HFConfig) -> None:
    """Raise ConfigError for one chosen expert, whose probability Megatron does not make 1 as transformers does."""
    if config["num_experts_per_tok"] == 1:
        raise ConfigError("config.json has num_experts_per_tok=1, whose probability Megatron does not normalise")


def write_experts(arch: dict[str, Any]) -> dict[str, Any]:
    """Return the fields of config.json for the experts of ``arch``: the inverse of `read_experts`.

    Raises: ConfigError for a model without shared experts.
    """
    if not arch["moe_shared_expert_intermediate_size"]:
        raise ConfigError("this model has no shared experts")
    width, limited = arch["moe_ffn_hidden_size"], arch["moe_router_num_groups"] is not None
    return {
        "moe_intermediate_size": width,
        "n_routed_experts": arch["num_moe_experts"],
        "n_shared_experts": arch["moe_shared_expert_intermediate_size"] // width,
        "num_experts_per_tok": arch["moe_router_topk"],
        "n_group": arch["moe_router_num_groups"] if limited else 1,
        "topk_group": arch["moe_router_group_topk"] if limited else 1,
        "norm_topk_prob": True,
        "routed_scaling_factor": arch["moe_router_topk_scaling_factor"],
        "first_k_dense_replace": arch["moe_layer_freq"].index(1),
        "num_nextn_predict_layers": arch["num_passthrough_mtp_layers"],
    }


def _read_deepseek(config: HFConfig) -> ModelConfig:
    _require_expressible_deepseek(config)
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


def _require_expressible_deepseek(config: HFConfig) -> None:
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


def _write_deepseek(arch: dict[str, Any]) -> dict[str, Any]:
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
    _read_deepseek,
    _write_deepseek,
    {
        **dict.fromkeys(("num_key_value_heads", "scoring_func", "topk_method", "moe_layer_freq")),
        "num_nextn_predict_layers": 1,
    },
    published_types=("kimi_k2",),
)


def _read_glm(config: HFConfig) -> ModelConfig:
    experts, transformer = read_experts(config)
    return read_common(
        config,
        **rotary_fields(read_rope(config, partial=True), config),
        add_qkv_bias=bool(config["attention_bias"]),
        qk_layernorm=bool(config["use_qk_norm"]),
        **experts,
        transformer=transformer,
    )


def _write_glm(arch: dict[str, Any]) -> dict[str, Any]:
    return {
        **write_decoder(arch),
        **write_experts(arch),
        "partial_rotary_factor": arch["rotary_percent"],
        "attention_bias": arch["add_qkv_bias"],
        "use_qk_norm": arch["qk_layernorm"],
    }


GLM4_MOE = Family(
    "Glm4MoeForCausalLM",
    "glm4_moe",
    _read_glm,
    _write_glm,
    {"partial_rotary_factor": 0.5, "num_nextn_predict_layers": 1},
)
