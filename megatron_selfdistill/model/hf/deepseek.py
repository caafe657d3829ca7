# Copyright (c) 2026 the megatron_selfdistill authors. Apache-2.0.
"""The family DeepSeek-V3: latent attention, leading dense layers, shared experts, and a sigmoid router with groups."""

from __future__ import annotations

from typing import Any

from megatron_selfdistill.config import ModelConfig
from megatron_selfdistill.errors import ConfigError
from megatron_selfdistill.model.hf.dense import COMMON_DEFAULTS, read_common, write_common
from megatron_selfdistill.model.hf.family import Family, HFConfig
from megatron_selfdistill.model.hf.rope import read_rope, write_yarn, yarn_fields


def _read(config: HFConfig) -> ModelConfig:
    _require_expressible(config)
    rope = read_rope(config)
    transformer = {
        "multi_latent_attention": True,
        "q_lora_rank": config["q_lora_rank"],
        "kv_lora_rank": config["kv_lora_rank"],
        "qk_head_dim": config["qk_nope_head_dim"],
        "qk_pos_emb_head_dim": config["qk_rope_head_dim"],
        "v_head_dim": config["v_head_dim"],
        **yarn_fields(rope, config),
        "moe_router_topk_scaling_factor": config["routed_scaling_factor"],
        "moe_shared_expert_intermediate_size": config["n_shared_experts"] * config["moe_intermediate_size"],
        "moe_router_dtype": "fp32",
        "moe_router_bias_update_rate": 0.0,  # self-distillation does not balance experts
    }
    num_layers, dense = config["num_hidden_layers"], config["first_k_dense_replace"]
    if dense:
        transformer["moe_layer_freq"] = [int(layer >= dense) for layer in range(num_layers)]
    if config["topk_group"] < config["n_group"]:
        transformer["moe_router_num_groups"] = config["n_group"]
        transformer["moe_router_group_topk"] = config["topk_group"]
    return read_common(
        config,
        num_query_groups=config["num_attention_heads"],
        kv_channels=config["qk_nope_head_dim"],
        rotary_base=rope.base,
        qk_layernorm=True,
        num_moe_experts=config["n_routed_experts"],
        moe_router_topk=config["num_experts_per_tok"],
        moe_ffn_hidden_size=config["moe_intermediate_size"],
        moe_router_enable_expert_bias=True,
        moe_router_score_function="sigmoid",
        num_passthrough_mtp_layers=_mtp_layers(config),
        transformer=transformer,
    )


def _require_expressible(config: HFConfig) -> None:
    """Raise ConfigError for a config.json that Megatron Core cannot express.

    Megatron Core has one epsilon, normalises the probabilities of more than one expert, and scores a group by its best
    ``topk // group_topk`` experts, while transformers takes the best two.
    """
    config.require("rms_norm_eps", (1e-6,), "latent attention has 1e-6, and Megatron one for all norms")
    config.require("attention_bias", (False, None), "biases are not known here")
    config.require("scoring_func", ("sigmoid", None), "DeepseekV3ForCausalLM always takes the sigmoid of the scores")
    config.require(
        "topk_method", ("noaux_tc", None), "DeepseekV3ForCausalLM always chooses experts with biases (noaux_tc)"
    )
    config.require("rope_interleave", (True, None), "Megatron rotates neighbouring channels")
    config.require("norm_topk_prob", (True,), "Megatron always normalises the probabilities of sigmoid routers")
    config.require("num_key_value_heads", (None, config["num_attention_heads"]), "expected num_attention_heads")
    config.require("head_dim", (None, config["qk_rope_head_dim"]), "expected qk_rope_head_dim, whose channels rotate")
    topk, groups = config["num_experts_per_tok"], config["topk_group"]
    if topk == 1:
        raise ConfigError("config.json has num_experts_per_tok=1, whose probability Megatron does not normalise")
    if not config["n_shared_experts"]:
        raise ConfigError("config.json has n_shared_experts=0: DeepseekV3ForCausalLM always has shared experts")
    if groups > config["n_group"]:
        raise ConfigError(f"config.json has topk_group={groups}, more than n_group={config['n_group']}")
    if groups < config["n_group"] and topk // groups != 2:
        raise ConfigError(
            f"config.json has num_experts_per_tok={topk} and topk_group={groups}: Megatron scores a group by its best "
            f"{topk // groups} experts, transformers by its best 2, so only a ratio of 2 is the same"
        )
    if config["first_k_dense_replace"] >= config["num_hidden_layers"]:
        raise ConfigError("config.json has no layer with experts (first_k_dense_replace >= num_hidden_layers)")


def _mtp_layers(config: HFConfig) -> int:
    if "num_mtp_layers" in config.values:
        return config["num_mtp_layers"] or 0
    return config["num_nextn_predict_layers"] or 0


def _write(arch: dict[str, Any]) -> dict[str, Any]:
    if not arch["multi_latent_attention"] or not arch["moe_shared_expert_intermediate_size"]:
        raise ConfigError("DeepseekV3ForCausalLM has multi-latent attention and shared experts, this model has not")
    width, limited = arch["moe_ffn_hidden_size"], arch["moe_router_num_groups"] is not None
    config = write_common(arch) | write_yarn(arch)
    del config["head_dim"]  # transformers derives it: the rotary channels
    return config | {
        "attention_bias": False,
        "q_lora_rank": arch["q_lora_rank"],
        "kv_lora_rank": arch["kv_lora_rank"],
        "qk_nope_head_dim": arch["qk_head_dim"],
        "qk_rope_head_dim": arch["qk_pos_emb_head_dim"],
        "v_head_dim": arch["v_head_dim"],
        "moe_intermediate_size": width,
        "n_routed_experts": arch["num_moe_experts"],
        "n_shared_experts": arch["moe_shared_expert_intermediate_size"] // width,
        "num_experts_per_tok": arch["moe_router_topk"],
        "n_group": arch["moe_router_num_groups"] if limited else 1,
        "topk_group": arch["moe_router_group_topk"] if limited else 1,
        "scoring_func": "sigmoid",
        "topk_method": "noaux_tc",
        "norm_topk_prob": True,
        "routed_scaling_factor": arch["moe_router_topk_scaling_factor"],
        "first_k_dense_replace": arch["moe_layer_freq"].index(1),
        "moe_layer_freq": 1,
        "num_nextn_predict_layers": arch["num_passthrough_mtp_layers"],
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
        "num_nextn_predict_layers": 1,
    },
    models="DeepSeek-V3, V3.1 and R1",
    limits="`scoring_func=sigmoid`, `topk_method=noaux_tc`, `norm_topk_prob=true`, `rms_norm_eps=1e-6`",
)
