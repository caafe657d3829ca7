# Copyright (c) 2026 the megatron_selfdistill authors. Apache-2.0.
"""The command-line flags with which Megatron-LM builds the model of a checkpoint.

    flags = megatron_flags(model)
    flags.arguments               # ["--num-layers", "36", ..., "--qk-layernorm", "--norm-epsilon", "1e-06"]
    flags.not_expressible         # ("rope_scaling_factor=32.0",)

Megatron-LM's ``--use-checkpoint-args`` does not restore all of them.  Without ``--qk-layernorm`` or ``--norm-epsilon``
a checkpoint loads without an error, and the model computes other numbers.
Source: ``megatron/training/arguments.py`` and ``gpt_builders.py`` of core_v0.16.1, and ``argument_utils.py`` of 0.19.0.
"""

from __future__ import annotations

import argparse
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from megatron_selfdistill.checkpoint.formats.megatron_args import YARN, model_args
from megatron_selfdistill.compat import older_megatron
from megatron_selfdistill.config import ModelConfig, OptimizerConfig, ParallelConfig, ScheduleConfig
from megatron_selfdistill.model.architecture import padded_vocab_size, transformer_config
from megatron_selfdistill.model.model_values import ROPE_FACTOR, TRANSFORMER_DEFAULTS, architecture

MEGATRON_LM = f"core_v{older_megatron.version_text()}"
"""The release of Megatron-LM whose flags are listed here: that of the installed Megatron Core."""
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
_WITHOUT_FLAGS = ("beta_fast", "beta_slow", "original_max_position_embeddings", "latent_layernorm_epsilon")


@dataclass(frozen=True)
class MegatronFlags:
    """The flags of one model, and the properties that no flag expresses."""

    arguments: list[str]
    """The flags with their values as an argument vector."""
    not_expressible: tuple[str, ...]
    """Each property of the model that no flag sets, as name=value; empty if Megatron-LM computes the same numbers."""


def megatron_flags(
    model: ModelConfig, *, dtype: torch.dtype | None = None, padded_vocab_size: int | None = None
) -> MegatronFlags:
    """Return the flags that describe ``model``, and the properties that no flag expresses.

    ``dtype``: the type of the weights; null and float32 add no flag.  ``padded_vocab_size``: the number of rows of the
    stored embedding; null pads ``model.vocab_size``.  The flags do not include paths, the tokenizer, batch sizes and
    the parallel layout, which the user chooses.
    """
    arch = architecture(model)
    flags = [*_sizes(model, arch), *_vocabulary(model, padded_vocab_size), *_attention(arch), *_mlp(arch)]
    flags += [*_moe(model, arch), *_further(arch)]
    if dtype in _PRECISIONS:
        flags.append((_PRECISIONS[dtype],))
    return MegatronFlags([word for flag in flags for word in flag], tuple(_not_expressible(arch)))


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


def _vocabulary(model: ModelConfig, rows: int | None) -> Iterator[tuple[str, ...]]:
    divisor = model.make_vocab_size_divisible_by
    if rows is None and model.vocab_size is not None:
        rows = padded_vocab_size(model.vocab_size, divisor, 1)
    yield "--make-vocab-size-divisible-by", str(divisor)
    if rows is not None:
        yield "--padded-vocab-size", str(rows)


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
    if older_megatron.has_flags_of_positions():
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


def _not_expressible(arch: dict[str, Any]) -> Iterator[str]:
    """Yield the properties with which Megatron-LM computes other numbers; docs/conversion.md has the reasons."""
    activation, gated, divisor = arch["activation"], arch["gated_linear_unit"], arch["seq_len_interpolation_factor"]
    has_flags = older_megatron.has_flags_of_positions()
    of_latents = {**TRANSFORMER_DEFAULTS, "latent_layernorm_epsilon": arch["layernorm_epsilon"]}
    differing = {
        "rope_scaling_factor": arch["rope_scaling_factor"] not in (None, ROPE_FACTOR),
        "position_embedding_type": arch["position_embedding_type"] == "yarn" and not has_flags,
        "seq_len_interpolation_factor": divisor is not None and not (has_flags and divisor == int(divisor)),
        "qk_layernorm_all_heads": arch["qk_layernorm_all_heads"],
        "activation": gated != (activation in ("silu", "quick_gelu"))
        or (activation == "gelu_tanh" and (not arch["add_bias_linear"] or arch["num_moe_experts"] is not None)),
        "experimental_attention_variant": arch["experimental_attention_variant"] is not None,
        "softmax_scale": arch["softmax_scale"] is not None,
        **{name: arch[name] not in (None, of_latents[name]) for name in _WITHOUT_FLAGS},
    }
    yield from (f"{name}={arch[name]}" for name, differs in differing.items() if differs)


def _list(values: Sequence[int]) -> str:
    return "[" + ",".join(map(str, values)) + "]"


def _flag(name: str) -> str:
    return "--" + name.replace("_", "-")


def converted_args(model: ModelConfig, dtype: torch.dtype) -> argparse.Namespace:
    """Return the arguments of Megatron-LM that describe ``model``; ``dtype`` is the type of its weights."""
    precision = "fp32" if dtype == torch.float32 else "bf16"
    config = transformer_config(model, ParallelConfig(), OptimizerConfig(precision=precision), ScheduleConfig())
    assert model.vocab_size is not None
    args = model_args(
        config,
        model,
        model,
        max_position_embeddings=model.max_position_embeddings,
        padded_vocab_size=padded_vocab_size(model.vocab_size, model.make_vocab_size_divisible_by, 1),
        rope_scaling=model.rope_scaling_factor is not None,
        seq_len_interpolation_factor=model.seq_len_interpolation_factor,
    )
    args.params_dtype, args.bf16, args.fp16 = dtype, dtype == torch.bfloat16, dtype == torch.float16
    return args
