# Copyright (c) 2026 the megatron_selfdistill authors. Apache-2.0.
"""The families Qwen3-Next and Qwen3.5 (text): gated delta nets between layers of gated attention, and partial RoPE."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from megatron_selfdistill.config import ModelConfig
from megatron_selfdistill.errors import ConfigError
from megatron_selfdistill.interop.hf.decoder import TensorNames
from megatron_selfdistill.interop.hf.dense import expert_fields, read_common, write_common
from megatron_selfdistill.interop.hf.experts import softmax_router, sparse_layers, write_expert_sizes, write_experts
from megatron_selfdistill.interop.hf.family import Family, HFConfig
from megatron_selfdistill.interop.hf.rope import read_rope, rotary_fields, write_rotary
from megatron_selfdistill.interop.hf.sigmoid_router import require_normalised
from megatron_selfdistill.interop.hf.sliding_windows import FULL, LINEAR

_SIZES = (
    "linear_conv_kernel_dim",
    "linear_key_head_dim",
    "linear_value_head_dim",
    "linear_num_key_heads",
    "linear_num_value_heads",
)
"""The sizes of gated delta nets, by the same names in config.json and in Megatron."""


def _reader(router: Callable[[HFConfig], dict[str, Any]] | None = None) -> Callable[[HFConfig], ModelConfig]:
    """Return the reader of a family; ``router`` returns the keys of its router, None is a family without experts."""

    def read(config: HFConfig) -> ModelConfig:
        config.require("attention_bias", (False, None), "biases are not known here")
        config.require("attn_output_gate", (True, None), "transformers has an output gate in every layer of attention")
        linear = _linear_layers(config)
        transformer: dict[str, Any] = {"layernorm_zero_centered_gamma": True, "attention_output_gate": True}
        if any(linear):
            transformer |= {"experimental_attention_variant": "gated_delta_net", "linear_attention_freq": linear}
            transformer |= {name: config[name] for name in _SIZES}
        # mrope_section changes nothing for text, whose three positions are equal.
        fields: dict[str, Any] = {"qk_layernorm": True, **rotary_fields(read_rope(config, partial=True), config)}
        fields["num_passthrough_mtp_layers"] = config["num_nextn_predict_layers"] or 0
        if router is not None:
            fields |= expert_fields(config)
            width = config["shared_expert_intermediate_size"]
            transformer |= {"moe_shared_expert_intermediate_size": width, "moe_shared_expert_gate": True}
            transformer |= router(config)
        return read_common(config, transformer=transformer, **fields)

    return read


def _linear_layers(config: HFConfig) -> list[int]:
    """Return 1 for each layer with a gated delta net and 0 for each layer with attention."""
    num_layers, kinds = config["num_hidden_layers"], config["layer_types"]
    if kinds is None:
        return [int((layer + 1) % config["full_attention_interval"] != 0) for layer in range(num_layers)]
    return [int(kind == LINEAR) for kind in kinds]  # `require_layer_types` checks the list


def _normalised(config: HFConfig) -> dict[str, Any]:
    """Return no key: in Qwen3.5 every layer has experts, and the chosen probabilities sum to 1."""
    require_normalised(config)
    return {}


def _softmax_in_some_layers(config: HFConfig) -> dict[str, Any]:
    """Return the keys of Qwen3-Next, where layers may be dense and the chosen probabilities may sum to less."""
    otherwise = " (mlp_only_layers, decoder_sparse_step): this family is known with experts only"
    return sparse_layers(config, otherwise) | softmax_router(config)


def _writer(
    experts: Callable[[dict[str, Any]], dict[str, Any]] | None = None,
) -> Callable[[dict[str, Any]], dict[str, Any]]:
    """Return the function from an architecture to config.json: the inverse of `_reader`."""

    def write(arch: dict[str, Any]) -> dict[str, Any]:
        if (experts is None) != (arch["num_moe_experts"] is None):
            raise ConfigError(f"this model has {'' if experts is None else 'no '}experts")
        linear = arch["linear_attention_freq"] or [0] * arch["num_layers"]
        rotary = write_rotary(arch)
        config = write_common(arch) | {
            "attention_bias": False,
            "num_nextn_predict_layers": arch["num_passthrough_mtp_layers"],
            "layer_types": [LINEAR if is_linear else FULL for is_linear in linear],
            "rope_parameters": {
                **(rotary["rope_scaling"] or {"rope_type": "default"}),
                "rope_theta": rotary["rope_theta"],
                "partial_rotary_factor": arch["rotary_percent"],
            },
        }
        if arch["linear_attention_freq"] is not None:
            config |= {name: arch[name] for name in _SIZES}
        if experts is not None:
            config |= experts(arch) | {"shared_expert_intermediate_size": arch["moe_shared_expert_intermediate_size"]}
        return config

    return write


_DEFAULTS = {
    "partial_rotary_factor": 0.25,
    "full_attention_interval": 4,
    "attn_output_gate": None,
    "num_nextn_predict_layers": 1,
}

QWEN3_NEXT = Family(
    "Qwen3NextForCausalLM",
    "qwen3_next",
    _reader(_softmax_in_some_layers),
    _writer(write_experts),
    _DEFAULTS,
    TensorNames(shared="shared_expert", mtp="mtp"),
)
QWEN3_5 = Family(
    "Qwen3_5ForCausalLM",
    "qwen3_5_text",
    _reader(),
    _writer(),
    _DEFAULTS,
    TensorNames(fused_projections=False, mtp="mtp"),
)
QWEN3_5_MOE = Family(
    "Qwen3_5MoeForCausalLM",
    "qwen3_5_moe_text",
    _reader(_normalised),
    _writer(write_expert_sizes),
    _DEFAULTS | {"intermediate_size": 512},
    TensorNames(shared="shared_expert", fused_projections=False, mtp="mtp"),
)
