# Copyright (c) 2026 the megatron_selfdistill authors. Apache-2.0.
"""The experts of DeepSeek-V3 and GLM-4.5: leading dense layers, shared experts, a sigmoid router with groups.

Other families with a sigmoid router share its fields and its refusal.
"""

from __future__ import annotations

from typing import Any

from megatron_selfdistill.errors import ConfigError
from megatron_selfdistill.model.hf.family import HFConfig

ROUTER_FIELDS = {"moe_router_enable_expert_bias": True, "moe_router_score_function": "sigmoid"}
"""The fields of `ModelConfig` that every sigmoid router with biases has."""

ROUTER_KEYS = {
    "moe_router_dtype": "fp32",
    "moe_router_bias_update_rate": 0.0,  # self-distillation does not balance experts
}
"""The keys of ``model.transformer`` that every sigmoid router with biases has."""


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
    fields = {
        "num_moe_experts": config.given("num_local_experts") or config["n_routed_experts"],
        "moe_router_topk": config["num_experts_per_tok"],
        "moe_ffn_hidden_size": config["moe_intermediate_size"],
        **ROUTER_FIELDS,
        "num_passthrough_mtp_layers": _mtp_layers(config),
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


def _mtp_layers(config: HFConfig) -> int:
    return config["num_mtp_layers" if "num_mtp_layers" in config.values else "num_nextn_predict_layers"] or 0


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
