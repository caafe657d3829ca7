# Copyright (c) 2026 the megatron_selfdistill authors. Apache-2.0.
"""The command-line flags with which Megatron-LM builds the model of a test."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

import torch

from megatron_selfdistill.checkpoint.formats.megatron_args import YARN
from megatron_selfdistill.compat import older_megatron
from megatron_selfdistill.config import ModelConfig
from megatron_selfdistill.model.architecture import padded_vocab_size
from megatron_selfdistill.model.model_values import TRANSFORMER_DEFAULTS, architecture

_PRECISIONS = {torch.bfloat16: "--bf16", torch.float16: "--fp16"}
_SWITCHES = {
    "layernorm_zero_centered_gamma": "--apply-layernorm-1p",
    "rotary_interleaved": "--rotary-interleaved",
    "qk_l2_norm": "--qk-l2-norm",
    "attention_output_gate": "--attention-output-gate",
    "apply_residual_connection_post_layernorm": "--apply-residual-connection-post-layernorm",
    "moe_shared_expert_gate": "--moe-shared-expert-gate",
    "moe_apply_probs_on_input": "--moe-apply-probs-on-input",
}
_VALUES = ("softmax_type", "activation_func_clamp_value", "glu_linear_offset", "no_rope_freq")
_SCALES = ("rotary_scaling_factor", "mscale", "mscale_all_dim")


def megatron_flags(model: ModelConfig, *, dtype: torch.dtype | None = None) -> list[str]:
    """Return the flags that describe ``model``; ``dtype``: the type of the weights, which null and float32 do not name.

    The flags do not include paths, the tokenizer, batch sizes and the parallel layout.
    """
    arch = architecture(model)
    flags = [*_sizes(model, arch), *_vocabulary(model), *_attention(arch), *_mlp(arch), *_moe(model, arch)]
    flags += _further(arch)
    if dtype in _PRECISIONS:
        flags.append((_PRECISIONS[dtype],))
    return [word for flag in flags for word in flag]


def _sizes(model: ModelConfig, arch: dict[str, Any]) -> Iterator[tuple[str, ...]]:
    yield "--num-layers", str(arch["num_layers"])
    yield "--hidden-size", str(arch["hidden_size"])
    yield "--ffn-hidden-size", str(arch["ffn_hidden_size"] or model.ffn_hidden_size or 4 * model.hidden_size)
    yield "--max-position-embeddings", str(arch["max_position_embeddings"])
    if not arch["share_embeddings_and_output_weights"]:
        yield ("--untie-embeddings-and-output-weights",)
    yield "--normalization", arch["normalization"]
    yield "--norm-epsilon", str(arch["layernorm_epsilon"])
    yield "--hidden-dropout", "0.0"
    yield "--attention-dropout", "0.0"


def _vocabulary(model: ModelConfig) -> Iterator[tuple[str, ...]]:
    divisor = model.make_vocab_size_divisible_by
    assert model.vocab_size is not None
    yield "--make-vocab-size-divisible-by", str(divisor)
    yield "--padded-vocab-size", str(padded_vocab_size(model.vocab_size, divisor, 1))


def _attention(arch: dict[str, Any]) -> Iterator[tuple[str, ...]]:
    yield "--num-attention-heads", str(arch["num_attention_heads"])
    if not arch["multi_latent_attention"]:
        yield "--kv-channels", str(arch["kv_channels"])
        if arch["num_query_groups"] != arch["num_attention_heads"]:
            yield ("--group-query-attention",)
            yield "--num-query-groups", str(arch["num_query_groups"])
    if arch["add_qkv_bias"]:
        yield ("--add-qkv-bias",)
    if arch["qk_layernorm"]:
        yield ("--qk-layernorm",)
    yield "--position-embedding-type", arch["position_embedding_type"]
    if arch["position_embedding_type"] in ("rope", "yarn"):
        yield "--rotary-base", str(arch["rotary_base"])
        yield "--rotary-percent", str(arch["rotary_percent"])
    if arch["rope_scaling_factor"] is not None:
        yield ("--use-rope-scaling",)
        yield "--rope-scaling-factor", str(arch["rope_scaling_factor"])
    if older_megatron.version() >= (0, 19):
        yield from _positions(arch)
    if arch["multi_latent_attention"]:
        yield from _latent_attention(arch)


def _positions(arch: dict[str, Any]) -> Iterator[tuple[str, ...]]:
    factor = arch["seq_len_interpolation_factor"]
    if factor is not None and factor == int(factor):
        yield "--rotary-seq-len-interpolation-factor", str(int(factor))
    if arch["position_embedding_type"] == "yarn":
        for name in YARN[:-1]:
            yield _flag(name.removeprefix("yarn_") if name.endswith(_SCALES) else name), str(arch[name])
        if not arch["yarn_correction_range_round_to_int"]:
            yield ("--no-yarn-correction-range-round-to-int",)


def _latent_attention(arch: dict[str, Any]) -> Iterator[tuple[str, ...]]:
    yield ("--multi-latent-attention",)
    if arch["q_lora_rank"] is not None:
        yield "--q-lora-rank", str(arch["q_lora_rank"])
    for name in ("kv_lora_rank", "qk_head_dim", "qk_pos_emb_head_dim", "v_head_dim", "rope_type"):
        yield _flag(name), str(arch[name])
    if arch["rope_type"] == "yarn":
        for name in _SCALES:
            yield _flag(name), str(float(arch[name]))


def _mlp(arch: dict[str, Any]) -> Iterator[tuple[str, ...]]:
    if not arch["add_bias_linear"]:
        yield ("--disable-bias-linear",)
    if arch["gated_linear_unit"] and arch["activation"] == "silu":
        yield ("--swiglu",)
    if arch["gated_linear_unit"] and arch["activation"] == "quick_gelu":
        yield ("--quick-geglu",)
        yield ("--no-bias-gelu-fusion",)  # Megatron Core refuses the fused kernel without experts
    if arch["activation"] == "gelu" and arch["add_bias_linear"]:
        yield ("--no-bias-gelu-fusion",)  # the fused kernel is the tanh approximation


def _moe(model: ModelConfig, arch: dict[str, Any]) -> Iterator[tuple[str, ...]]:
    if arch["num_moe_experts"] is None:
        return
    yield "--num-experts", str(arch["num_moe_experts"])
    yield "--moe-ffn-hidden-size", str(arch["moe_ffn_hidden_size"])
    if 0 in arch["moe_layer_freq"]:
        yield "--moe-layer-freq", _list(arch["moe_layer_freq"])
    yield "--moe-router-topk", str(arch["moe_router_topk"])
    yield "--moe-router-score-function", arch["moe_router_score_function"]
    balancing = model.transformer.get("moe_aux_loss_coeff")
    yield "--moe-router-load-balancing-type", "aux_loss" if balancing else "none"
    if balancing:
        yield "--moe-aux-loss-coeff", str(balancing)
    for name in ("moe_router_topk_scaling_factor", "moe_router_num_groups", "moe_router_group_topk"):
        if arch[name] is not None:
            yield _flag(name), str(arch[name])
    if arch["moe_router_pre_softmax"]:
        yield ("--moe-router-pre-softmax",)
    if arch["moe_router_enable_expert_bias"]:
        yield ("--moe-router-enable-expert-bias",)
        yield "--moe-router-bias-update-rate", str(model.transformer.get("moe_router_bias_update_rate", 1e-3))
    if model.transformer.get("moe_router_dtype"):
        yield "--moe-router-dtype", model.transformer["moe_router_dtype"]
    if arch["moe_shared_expert_intermediate_size"] is not None:
        yield "--moe-shared-expert-intermediate-size", str(arch["moe_shared_expert_intermediate_size"])


def _further(arch: dict[str, Any]) -> Iterator[tuple[str, ...]]:
    """Yield the flags of rare properties that the model has."""
    for name, flag in _SWITCHES.items():
        if arch[name]:
            yield (flag,)
    if arch["window_size"] is not None:
        yield "--window-size", ",".join(map(str, arch["window_size"]))
        if not all(arch["window_attn_skip_freq"]):
            yield "--window-attn-skip-freq", _list(arch["window_attn_skip_freq"])
    for name in _VALUES:
        if arch[name] is not None and arch[name] != TRANSFORMER_DEFAULTS[name]:
            value = arch[name]
            yield _flag(name), _list(value) if isinstance(value, list | tuple) else str(value)


def _list(values: Sequence[int]) -> str:
    return "[" + ",".join(map(str, values)) + "]"


def _flag(name: str) -> str:
    return "--" + name.replace("_", "-")
