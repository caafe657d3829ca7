# Copyright (c) 2026 the megatron_selfdistill authors. Apache-2.0.
"""Name the values that decide the tensors and logits of a model as Megatron does, and compare two models by them."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any

from megatron_selfdistill.config import ModelConfig

_NO_PART_OF_A_MODEL = {*"provider make_vocab_size_divisible_by init_method_std transformer".split()}

_MLA = {
    "q_lora_rank": 512,
    "kv_lora_rank": 512,
    "qk_head_dim": 128,
    "qk_pos_emb_head_dim": 64,
    "v_head_dim": 128,
    "rope_type": "yarn",
}
_YARN = {
    "rotary_scaling_factor": 40,
    "original_max_position_embeddings": 4096,
    "beta_fast": 32,
    "beta_slow": 1,
    "mscale": 1.0,
    "mscale_all_dim": 0.0,
}
_MOE = {
    "moe_layer_freq": 1,
    "moe_router_pre_softmax": False,
    "moe_router_topk_scaling_factor": None,
    "moe_router_num_groups": None,
    "moe_router_group_topk": None,
    "moe_shared_expert_intermediate_size": None,
    "moe_shared_expert_gate": False,
    "moe_apply_probs_on_input": False,
}
_ANY = {
    "multi_latent_attention": False,
    "layernorm_zero_centered_gamma": False,
    "window_size": None,
    "window_attn_skip_freq": None,
    "softmax_type": "vanilla",
    "softmax_scale": None,
    "rotary_interleaved": False,
    "no_rope_freq": None,
    "qk_l2_norm": False,
    "attention_output_gate": False,
    "linear_attention_freq": None,
    "linear_conv_kernel_dim": 4,
    "linear_key_head_dim": 128,
    "linear_value_head_dim": 128,
    "linear_num_key_heads": 16,
    "linear_num_value_heads": 32,
    "experimental_attention_variant": None,
    "apply_residual_connection_post_layernorm": False,
    "activation_func_clamp_value": None,
    "glu_linear_offset": 0.0,
}
ROPE_FACTOR = 8.0
"""The factor of Megatron's ``GPTModel`` with ``rope_scaling``, where none is given."""
LATENT_ONLY = (*_MLA, *_YARN)
"""The keys of `TRANSFORMER_DEFAULTS` that multi-latent attention alone has."""
TRANSFORMER_DEFAULTS = {**_ANY, **_MOE, **_MLA, **_YARN}
"""The keys of ``model.transformer`` that change logits, with Megatron's defaults.

A conversion ignores other keys, which choose kernels, parallelism and training.
"""


def architecture(model: ModelConfig) -> dict[str, Any]:
    """Return all values that decide a model's tensors and logits, by Megatron's names.

    The values are fields of `ModelConfig`, the entries of `ModelConfig.yarn` as ``yarn_NAME``, and the keys of
    `TRANSFORMER_DEFAULTS`.  Nulls are replaced by their meaning, and fields without effect by null, so that two
    configurations of one model are equal.
    """
    values = {f.name: getattr(model, f.name) for f in dataclasses.fields(model) if f.name not in _NO_PART_OF_A_MODEL}
    values |= {f"yarn_{name}": value for name, value in dataclasses.asdict(values.pop("yarn")).items()}
    values |= {name: model.transformer.get(name, default) for name, default in TRANSFORMER_DEFAULTS.items()}
    # The dictionary may override a field.
    values |= {name: value for name, value in model.transformer.items() if name in values}
    heads = values["num_attention_heads"]
    values["ffn_hidden_size"] = values["ffn_hidden_size"] or 4 * values["hidden_size"]
    values["num_query_groups"] = values["num_query_groups"] or heads
    values["kv_channels"] = values["kv_channels"] or values["hidden_size"] // heads
    values["no_rope_freq"] = layers_without_rope(values["no_rope_freq"], values["num_layers"])
    without_effect: set[str] = set()
    values["linear_attention_freq"] = linear_layers(values)
    if values["linear_attention_freq"] is None:
        without_effect |= {name for name in values if name.startswith("linear_")} | {"experimental_attention_variant"}
    if values["num_moe_experts"] is None:
        without_effect |= _MOE.keys() | {name for name in values if name.startswith("moe_")}
    else:
        values["moe_ffn_hidden_size"] = values["moe_ffn_hidden_size"] or values["ffn_hidden_size"]
        values["moe_layer_freq"] = moe_layers(values["moe_layer_freq"], values["num_layers"])
        if 0 not in values["moe_layer_freq"]:
            without_effect.add("ffn_hidden_size")
    if values["multi_latent_attention"]:
        without_effect |= {"kv_channels", "num_query_groups", "rope_scaling_factor", "seq_len_interpolation_factor"}
        values["latent_layernorm_epsilon"] = values["latent_layernorm_epsilon"] or values["layernorm_epsilon"]
    else:
        without_effect |= {*LATENT_ONLY, "latent_layernorm_epsilon"}
    if values["rope_type"] != "yarn":
        without_effect |= _YARN.keys()
    if values["position_embedding_type"] != "yarn":
        without_effect |= {name for name in values if name.startswith("yarn_")}
    _set_windows(values)
    return values | dict.fromkeys(without_effect & values.keys())


def _set_windows(values: dict[str, Any]) -> None:
    """Give equal windows equal values: a tuple, and a list with 1 for each layer that has the window."""
    window, freq, num_layers = values["window_size"], values["window_attn_skip_freq"], values["num_layers"]
    windowed = freq or [1] * num_layers  # as Megatron Core's is_layer_window_attention reads the field
    if window and isinstance(freq, int):
        windowed = [layer % freq != 0 for layer in range(1, num_layers + 1)]
    if not window or not any(windowed):
        values |= {"window_size": None, "window_attn_skip_freq": None}
    else:
        values |= {"window_size": tuple(window), "window_attn_skip_freq": [int(layer) for layer in windowed]}


def linear_layers(values: Mapping[str, Any]) -> list[int] | None:
    """Return 1 for each layer with a gated delta net and 0 for each other layer; None without such a layer."""
    if values["experimental_attention_variant"] != "gated_delta_net":
        return None
    freq, num_layers = values["linear_attention_freq"], values["num_layers"]
    linear = [int((i + 1) % freq != 0) for i in range(num_layers)] if isinstance(freq, int) else list(freq or [])
    return linear if any(linear) else None


def moe_layers(freq: int | list[int], num_layers: int) -> list[int]:
    """Return 1 for each layer with experts and 0 for each dense layer, from Megatron's ``moe_layer_freq``."""
    return [int(i % freq == 0) for i in range(num_layers)] if isinstance(freq, int) else [int(f) for f in freq]


def layers_without_rope(freq: int | list[int] | None, num_layers: int) -> list[int] | None:
    """Return 1 for each layer without rotary positions, from Megatron's ``no_rope_freq``; null without such a layer."""
    if isinstance(freq, int):
        return [int((i + 1) % freq == 0) for i in range(num_layers)] if freq else None
    return [int(f) for f in freq] if freq and any(freq) else None


def differences(a: ModelConfig, b: ModelConfig) -> dict[str, tuple[Any, Any]]:
    """Return the values of ``a`` and ``b`` that differ, by name; empty for two configurations of one model."""
    left, right = architecture(a), architecture(b)
    return {name: (left[name], right[name]) for name in left if left[name] != right[name]}
