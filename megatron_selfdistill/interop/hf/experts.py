# Copyright (c) 2026 the megatron_selfdistill authors. Apache-2.0.
"""The families of experts with a softmax router: Mixtral, Qwen2-MoE, Qwen3-MoE and OLMoE.

They have the common decoder.
"""

from __future__ import annotations

from typing import Any

from megatron_selfdistill.config import ModelConfig
from megatron_selfdistill.errors import ConfigError
from megatron_selfdistill.interop.hf.decoder import TensorNames
from megatron_selfdistill.interop.hf.dense import expert_fields, read_common, write_decoder
from megatron_selfdistill.interop.hf.family import Family, HFConfig
from megatron_selfdistill.interop.hf.rope import read_rope, rotary_fields
from megatron_selfdistill.interop.hf.sigmoid_router import require_normalised
from megatron_selfdistill.interop.hf.sliding_windows import SLIDING, window_keys, write_window


def _read_mixtral(config: HFConfig) -> ModelConfig:
    require_normalised(config)
    return read_common(
        config,
        transformer=window_keys(config),
        **expert_fields(config, "num_local_experts", "intermediate_size"),
        **rotary_fields(read_rope(config), config),
    )


def _write_mixtral(arch: dict[str, Any]) -> dict[str, Any]:
    require_experts(arch)
    return {
        **write_decoder(arch),
        "num_local_experts": arch["num_moe_experts"],
        "num_experts_per_tok": arch["moe_router_topk"],
        "sliding_window": write_window(arch),
    }


def _read_qwen3_moe(config: HFConfig) -> ModelConfig:
    config.require("attention_bias", (False, None), "biases are not known here")
    transformer = window_keys(config, [bool(config["use_sliding_window"])])
    transformer |= sparse_layers(config, otherwise=": call it Qwen3ForCausalLM") | softmax_router(config)
    count = "num_local_experts" if config.given("num_local_experts") else "num_experts"  # transformers 5 renames it
    return read_common(
        config,
        qk_layernorm=True,
        **expert_fields(config, count),
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
        raise config.error(f"has no layer with experts{otherwise}")
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
        **write_decoder(arch),
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
    {"rope_theta": 1e6},
    TensorNames(block="block_sparse_moe", gate="w1", up="w3", down="w2"),
)
QWEN3_MOE = Family("Qwen3MoeForCausalLM", "qwen3_moe", _read_qwen3_moe, _write_qwen3_moe)


def _read_olmoe(config: HFConfig) -> ModelConfig:
    config.require("attention_bias", (False, None), "biases are not known here")
    config.require("clip_qkv", (None,), "Megatron does not clip queries, keys and values")
    config.require("sliding_window", (None,), "transformers applies it in some of its kernels only")
    return read_common(
        config,
        qk_layernorm_all_heads=True,
        **expert_fields(config, width="intermediate_size"),
        transformer=softmax_router(config),
        **rotary_fields(read_rope(config), config),
    )


def _write_olmoe(arch: dict[str, Any]) -> dict[str, Any]:
    require_experts(arch)
    if arch["kv_channels"] != arch["hidden_size"] // arch["num_attention_heads"]:
        raise ConfigError(f"OlmoeForCausalLM has no heads of {arch['kv_channels']} channels")
    config = write_decoder(arch)
    del config["head_dim"]  # transformers derives it
    return config | {
        "attention_bias": False,
        "clip_qkv": None,
        "num_experts": arch["num_moe_experts"],
        "num_experts_per_tok": arch["moe_router_topk"],
        "norm_topk_prob": not arch["moe_router_pre_softmax"],
    }


OLMOE = Family("OlmoeForCausalLM", "olmoe", _read_olmoe, _write_olmoe)


def _read_qwen2_moe(config: HFConfig) -> ModelConfig:
    sliding = config["use_sliding_window"] or SLIDING in (config["layer_types"] or ())
    if sliding and window_keys(config):
        raise config.error(
            f"has a sliding_window of {config['sliding_window']} tokens: versions "
            "of transformers disagree on the layers that have it, and vLLM ignores it; set use_sliding_window to false"
        )
    config.require("qkv_bias", (True, False), "expected true or false")
    return read_common(
        config,
        add_qkv_bias=config["qkv_bias"],
        **expert_fields(config),
        transformer={
            "moe_shared_expert_intermediate_size": config["shared_expert_intermediate_size"],
            "moe_shared_expert_gate": True,
            **sparse_layers(config, otherwise=": call it Qwen2ForCausalLM"),
            **softmax_router(config),
        },
        **rotary_fields(read_rope(config), config),
    )


def _write_qwen2_moe(arch: dict[str, Any]) -> dict[str, Any]:
    require_experts(arch)
    if not arch["moe_shared_expert_gate"]:
        raise ConfigError("Qwen2MoeForCausalLM has a gated shared expert, this model has not")
    return {
        **write_decoder(arch),
        "qkv_bias": arch["add_qkv_bias"],
        **write_experts(arch),
        "shared_expert_intermediate_size": arch["moe_shared_expert_intermediate_size"],
        "use_sliding_window": False,
    }


QWEN2_MOE = Family(
    "Qwen2MoeForCausalLM",
    "qwen2_moe",
    _read_qwen2_moe,
    _write_qwen2_moe,
    tensor_names=TensorNames(shared="shared_expert"),
)
