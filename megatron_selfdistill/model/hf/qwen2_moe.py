# Copyright (c) 2026 the megatron_selfdistill authors. Apache-2.0.
"""The family Qwen2-MoE (and Qwen1.5-MoE): a softmax router, and a shared expert behind a sigmoid gate."""

from __future__ import annotations

from typing import Any

from megatron_selfdistill.config import ModelConfig
from megatron_selfdistill.errors import ConfigError
from megatron_selfdistill.model.hf.decoder import TensorNames
from megatron_selfdistill.model.hf.dense import COMMON_DEFAULTS, read_common, write_common
from megatron_selfdistill.model.hf.experts import require_experts, softmax_router, sparse_layers, write_experts
from megatron_selfdistill.model.hf.family import Family, HFConfig
from megatron_selfdistill.model.hf.rope import read_rope, rotary_fields, write_rotary
from megatron_selfdistill.model.hf.sliding_windows import SLIDING, every_layer, window_keys


def _read(config: HFConfig) -> ModelConfig:
    _refuse_windows(config)
    config.require("qkv_bias", (True, False), "expected true or false")
    return read_common(
        config,
        add_qkv_bias=config["qkv_bias"],
        num_moe_experts=config["num_experts"],
        moe_router_topk=config["num_experts_per_tok"],
        moe_ffn_hidden_size=config["moe_intermediate_size"],
        transformer={
            "moe_shared_expert_intermediate_size": config["shared_expert_intermediate_size"],
            "moe_shared_expert_gate": True,
            **sparse_layers(config, otherwise=": call it Qwen2ForCausalLM"),
            **softmax_router(config),
        },
        **rotary_fields(read_rope(config), config),
    )


def _refuse_windows(config: HFConfig) -> None:
    sliding = config["use_sliding_window"] or SLIDING in (config["layer_types"] or ())
    if sliding and window_keys(config, every_layer(config)):
        raise ConfigError(
            f"config.json of {config.architecture} has a sliding_window of {config['sliding_window']} tokens: versions "
            "of transformers disagree on the layers that have it, and vLLM ignores it; set use_sliding_window to false"
        )


def _write(arch: dict[str, Any]) -> dict[str, Any]:
    require_experts(arch)
    if not arch["moe_shared_expert_gate"]:
        raise ConfigError("Qwen2MoeForCausalLM has a gated shared expert, this model has not")
    return {
        **write_common(arch),
        **write_rotary(arch),
        "qkv_bias": arch["add_qkv_bias"],
        **write_experts(arch),
        "shared_expert_intermediate_size": arch["moe_shared_expert_intermediate_size"],
        "use_sliding_window": False,
    }


QWEN2_MOE = Family(
    "Qwen2MoeForCausalLM",
    "qwen2_moe",
    _read,
    _write,
    COMMON_DEFAULTS
    | {
        "num_key_value_heads": 16,
        "qkv_bias": True,
        "num_experts": 60,
        "num_experts_per_tok": 4,
        "moe_intermediate_size": 1408,
        "shared_expert_intermediate_size": 5632,
        "norm_topk_prob": False,
        "decoder_sparse_step": 1,
        "mlp_only_layers": None,
        "sliding_window": 4096,
    },
    TensorNames(shared="shared_expert"),
    models="Qwen1.5-MoE, Qwen2-57B-A14B",
    limits="no sliding window; `qkv_bias` may be true or false; dense layers between the others are allowed",
)
